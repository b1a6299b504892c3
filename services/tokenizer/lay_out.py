"""Prompts of texts whose positions a schema has fixed → token ids, and at which position each run of them stands. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.layout import Layout, Placement, Run, Segment

Encode = Callable[[str, bool], list[int]]  # a text's ids; whether with the special tokens that the model's rules add


class Misfit(ValueError):
    """What is to be laid out has no room, or no place."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """As in `shared.messages.Work`."""

    ids: list[int]
    placement: Placement | None = None

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.placement.end if self.placement else len(self.ids)


def lay_out(layout: Layout, text: str, special: bool, encode: Encode) -> Prompt:
    """`text` is the whole prompt, with a mark where the schema stands. What is before it (a template's words, or, if `special`,
    what the model's rules add) is the head. Raises Misfit.
    """
    if text.count(layout.mark) != 1:
        raise Misfit("the model's chat template has no place for the prompt schema's modules; use mode: exact")
    before, _, behind = text.partition(layout.mark)
    ids, own = encode(before, special), encode(behind, False)
    if not own:
        raise Misfit("nothing stands behind the prompt schema's modules: the prompt is empty")
    start = len(ids)
    parts = [_runs(segments, start, encode, ids) for segments in layout.parts]
    rest = (*_runs(layout.arguments, start, encode, ids), (start + layout.end, len(own)))
    _check(run for runs in (*parts, rest) for run in runs)
    return Prompt([*ids, *own], Placement(head=start, parts=tuple(runs for runs in parts if runs), rest=rest))


def _runs(segments: Sequence[Segment], start: int, encode: Encode, ids: list[int]) -> tuple[Run, ...]:
    runs = []
    for position, text in segments:
        if found := encode(text, False):
            runs.append((start + position, len(found)))
            ids += found
    return tuple(runs)


def _check(runs: Iterable[Run]) -> None:
    """The schema's positions came from another process: a text with more tokens than it counted would run into the next."""
    for (position, count), (following, _) in pairwise(sorted(runs)):
        if position + count > following:
            raise Misfit(f"a module or an argument reaches from position {position} beyond {following}, where another begins")
