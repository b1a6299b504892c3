"""Prompts with parts that are computed apart (prompt modules): how they lie in pages, and what these pages are called. Pure.

Keys are turned to their positions before they are stored, so attention does not ask in which order they lie. A sequence's
places are therefore packed: the whole blocks of all its parts, which it shares with whoever uses the same parts; then the
parts' loose tokens, which fill no block, copied into blocks of its own; then all that is computed for it alone. A token's
place says which tokens it sees (those before it); its position, which the schema has fixed, says how far from them it is.

What stands before all modules, a chat template's first words, is a part as well: the head. All others see it, or each would
begin as a text of its own does, with a token that draws attention for nothing. So their chains begin with it, but only the
head itself brings it into a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from shared.blocks import branch, chain
from shared.fields import pack_ids
from shared.layout import Placement, Run

FILLING = 0  # the token behind a part's last one, up to the end of its block: that block has a name, too. Nobody sees it.

Runs = tuple[tuple[int, int], ...]  # (place, position): from this place on, positions count up from this one


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens that see nothing but each other: perhaps the head's, then the part's own, then filling up to whole blocks."""

    tokens: tuple[int, ...]
    length: int  # of its own
    whole: range  # blocks of nothing but its own
    loose: tuple[int, ...]  # places of its own tokens in other blocks
    runs: Runs
    root: bytes
    hashes: tuple[bytes, ...]  # of all blocks


@dataclass(frozen=True, slots=True)
class Packed:
    """A prompt by places. The first of its `hashes` are those of the parts' whole blocks; the others hang on `root`."""

    tokens: list[int]
    parts: tuple[Part, ...]
    runs: Runs
    root: bytes
    hashes: list[bytes]


def pack(prompt: Sequence[int], placement: Placement, root: bytes, block_size: int) -> Packed:
    """Of a prompt whose tokens are in the placement's order."""
    head, first = prompt[: placement.head], placement.head
    before = ((0, first),) if head else ()
    made = [_part(head, 0, before, root, block_size)] if head else []
    for runs in placement.parts:
        end = first + sum(count for _, count in runs)
        made.append(_part((*head, *prompt[first:end]), len(head), (*before, *runs), root, block_size))
        first = end
    shared = [part.tokens[block * block_size + at] for part in made for block in part.whole for at in range(block_size)]
    loose = [part.tokens[place] for part in made for place in part.loose]
    own, places = [*loose, *prompt[first:]], _places(first, placement.rest)
    start = branch(root, *(part.hashes[-1] for part in made), pack_ids(part.length for part in made), _packed(places))
    hashes = [part.hashes[block] for part in made for block in part.whole]
    return Packed(shared + own, tuple(made), places, start, hashes + chain(start, pack_ids(own), block_size))


def _part(tokens: Sequence[int], first: int, runs: Sequence[Run], root: bytes, block_size: int) -> Part:
    """Its own tokens begin at the place `first`. Its positions are in the root of its chain: elsewhere in a schema, the same
    text is another part.
    """
    places, length = _places(0, runs), len(tokens)
    filled = (*tokens, *(FILLING,) * (-length % block_size))
    start = branch(root, _packed(places))
    whole = range(-(-first // block_size), max(-(-first // block_size), length // block_size))
    loose = tuple(place for place in range(first, length) if place // block_size not in whole)
    hashes = tuple(chain(start, pack_ids(filled), block_size))
    return Part(filled, length - first, whole, loose, places, start, hashes)


def _places(first: int, runs: Sequence[Run]) -> Runs:
    starts = accumulate((count for _, count in runs), initial=first)
    return tuple((place, position) for place, (position, _) in zip(starts, runs, strict=False))


def _packed(runs: Runs) -> bytes:
    return pack_ids(number for run in runs for number in run)


def positions(runs: Runs, start: int, end: int) -> tuple[int, ...]:
    """Of the tokens at the places from `start` to `end`; empty without runs, where each stands at the position of its place."""
    if not runs:
        return ()
    found: list[int] = []
    ends = (*(place for place, _ in runs[1:]), end)
    for (place, position), last in zip(runs, ends, strict=False):
        found += range(position + max(start, place) - place, position + min(end, last) - place)
    return tuple(found)
