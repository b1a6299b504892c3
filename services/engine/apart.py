"""Who is next in the queue, where one waits for what others compute for it: the beginning of its prompt that others have, too,
or parts of it that are computed apart, by sequences of their own, if need be. Pure.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq

from services.engine.pages import Pages
from services.engine.parts import Part
from services.engine.sequence import Sequence


def first(waiting: deque[Sequence], running: Seq[Sequence], pages: Pages) -> Sequence | None:
    """Who is next in the queue. One whose parts are not all here waits, behind those of them that nobody is computing yet."""
    leader = _leader(waiting, running, pages.block_size) if waiting else None
    if leader is None or not (parts := [part for part in leader.parts if not _here(part, pages)]):
        return leader
    if pages.blocks_for(leader.total + 1) + leader.aside + len(running) > pages.free:
        return None  # what is computed for it now would be forgotten before it has room
    begun = {sequence.hashes[-1] for sequence in running if sequence.apart}
    new = [part for part in parts if part.hashes[-1] not in begun]
    leader.made = min(leader.made + sum(part.length for part in new), leader.parted)
    waiting.extendleft(_alone(leader, part) for part in reversed(new))
    return waiting[0] if new else None


def _leader(waiting: Iterable[Sequence], running: Iterable[Sequence], block_size: int) -> Sequence | None:
    """The first one that gains nothing by waiting: nobody is computing the next block of its prompt for another."""
    coming = [(other.published, other.hashes[other.published]) for other in running if other.published < len(other.hashes)]
    for sequence in waiting:
        findable = min(len(sequence.hashes), (sequence.total - 1) // block_size)
        # Chained hashes: where one is equal, so are all before it.
        if not any(at < findable and sequence.hashes[at] == hash for at, hash in coming):
            return sequence
    return None


def _here(part: Part, pages: Pages) -> bool:
    return len(pages.match(part.hashes)) == len(part.hashes)


def _alone(sequence: Sequence, part: Part) -> Sequence:
    """A part as a sequence, on behalf of one that lacks it."""
    return Sequence(
        request=sequence.request,
        choice=sequence.choice,
        tokens=list(part.tokens),
        prompt_length=len(part.tokens),
        limit=len(part.tokens) + 1,
        sampling=sequence.sampling,
        hashes=list(part.hashes),
        root=part.root,
        runs=part.runs,
        apart=True,
        arrival=sequence.arrival,
    )


def loose_slots(sequence: Sequence, pages: Pages) -> list[int]:
    """Where the loose tokens of its parts are, which are all here."""
    size = pages.block_size
    found = [(pages.match(part.hashes), part.loose) for part in sequence.parts]
    return [blocks[place // size] * size + place % size for blocks, places in found for place in places]


def loose_copies(sequence: Sequence, block_size: int) -> Iterator[tuple[int, int]]:
    """To the sequence's own blocks, as far as it has not found these filled already."""
    sources = sequence.loose + sequence.loose[-1:] * (-len(sequence.loose) % block_size)
    # The last one is repeated to its block's end: what no token has filled may be no number.
    for place, source in enumerate(sources, start=sequence.stem * block_size):
        block = place // block_size
        if block >= sequence.published:
            yield source, sequence.blocks[block] * block_size + place % block_size


def block_copies(source: int, target: int, block_size: int) -> Iterable[tuple[int, int]]:
    return zip(*(range(block * block_size, (block + 1) * block_size) for block in (source, target)), strict=True)
