"""Prompts with parts that are computed apart (prompt modules): how they lie in pages, and what these pages are called. Pure.

Keys are turned to their positions before they are stored, so attention does not ask in which order they lie. A sequence's
places are therefore packed: the whole blocks of all its parts, which it shares with whoever uses the same parts; then the
parts' tails, tokens that fill no block, copied into blocks of its own; then all that is computed for it alone. A token's
place says which tokens it sees (those before it); its position, which the schema has fixed, says how far from them it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from shared.blocks import branch, chain
from shared.fields import pack_ids
from shared.layout import Run

FILLING = 0  # the token behind a part's last one, up to the end of its block: that block has a name, too. Nobody sees it.

Runs = tuple[tuple[int, int], ...]  # (place, position): from this place on, positions count up from this one


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens that see nothing but each other, filled up to whole blocks. `hashes` name all of its blocks."""

    tokens: tuple[int, ...]
    length: int  # without filling
    tail: int  # tokens of the last block where that is filled up, else 0
    runs: Runs
    root: bytes
    hashes: tuple[bytes, ...]

    @property
    def whole(self) -> int:
        """Blocks without filling."""
        return len(self.hashes) - bool(self.tail)


@dataclass(frozen=True, slots=True)
class Packed:
    """A prompt by places. The first of its `hashes` are those of the parts' whole blocks; the others hang on `root`."""

    tokens: list[int]
    parts: tuple[Part, ...]
    runs: Runs
    root: bytes
    hashes: list[bytes]


def pack(prompt: Sequence[int], parts: Iterable[Sequence[Run]], rest: Sequence[Run], root: bytes, block_size: int) -> Packed:
    """`prompt` has the tokens of all runs end to end: each part's, then the rest's."""
    made: list[Part] = []
    first = 0
    for runs in parts:
        end = first + sum(count for _, count in runs)
        made.append(_part(prompt[first:end], runs, root, block_size))
        first = end
    shared = [token for part in made for token in part.tokens[: part.whole * block_size]]
    tails = [token for part in made for token in part.tokens[part.whole * block_size : part.length]]
    own, places = [*tails, *prompt[first:]], _places(first, rest)
    start = branch(root, *(part.hashes[-1] for part in made), pack_ids(part.length for part in made), _packed(places))
    hashes = [hash for part in made for hash in part.hashes[: part.whole]]
    return Packed(shared + own, tuple(made), places, start, hashes + chain(start, pack_ids(own), block_size))


def _part(tokens: Sequence[int], runs: Sequence[Run], root: bytes, block_size: int) -> Part:
    """Its positions are in the root of its chain: elsewhere in a schema, the same text is another part."""
    places = _places(0, runs)
    filled = (*tokens, *(FILLING,) * (-len(tokens) % block_size))
    start = branch(root, _packed(places))
    hashes = tuple(chain(start, pack_ids(filled), block_size))
    return Part(filled, len(tokens), len(tokens) % block_size, places, start, hashes)


def _places(first: int, runs: Sequence[Run]) -> Runs:
    starts = accumulate((count for _, count in runs), initial=first)
    return tuple((place, position) for place, (position, _) in zip(starts, runs, strict=False))


def _packed(runs: Runs) -> bytes:
    return pack_ids(number for run in runs for number in run)


def positions(runs: Runs, start: int, end: int) -> tuple[int, ...]:
    """Of the tokens at the places from `start` to `end`; empty without runs, where each stands at the position of its place."""
    found: list[int] = []
    ends = (*(place for place, _ in runs[1:]), end)
    for (place, position), last in zip(runs, ends, strict=False):
        found += range(position + max(start, place) - place, position + min(end, last) - place)
    return tuple(found)
