"""Who has which pages, and until when. Pure: the caller brings the clock.

A reader that is silent for too long loses its pins: it verifies what it has copied, where it has copied it to.
A writer that is silent for too long loses its pages, so that another may write them, but keeps their slots busy until it
speaks again or its connection ends: a process that was stopped in the middle of a write may go on with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.prefix_cache.index import Index, Page


@dataclass(slots=True, eq=False)
class Lease:
    pages: Sequence[Page]
    expires: float
    writing: bool


@dataclass(slots=True, eq=False)
class Holder:
    """One connection. At most `most` leases at once."""

    leases: dict[int, Lease] = field(default_factory=dict)
    opened: int = 0

    @property
    def writing(self) -> int:
        """Pages whose slots it may be writing to."""
        return sum(len(lease.pages) for lease in self.leases.values() if lease.writing)


class Leases:
    def __init__(self, index: Index, seconds: float) -> None:
        self._index, self.seconds = index, seconds
        self._holders: set[Holder] = set()
        self.expired = 0

    @property
    def holders(self) -> int:
        return len(self._holders)

    def join(self) -> Holder:
        holder = Holder()
        self._holders.add(holder)
        return holder

    def leave(self, holder: Holder) -> None:
        """Its connection has ended: nothing that it held is held any more."""
        for number in list(holder.leases):
            self.close(holder, number)
        self._holders.discard(holder)

    def open(self, holder: Holder, pages: Sequence[Page], now: float, writing: bool) -> int:
        """Lease pages that the index has pinned. 0 is no lease, of no pages."""
        if not pages:
            return 0
        holder.opened += 1
        holder.leases[holder.opened] = Lease(pages, now + self.seconds, writing)
        return holder.opened

    def commit(self, holder: Holder, number: int, written: int) -> int:
        """Returns how many pages became ready; what was not written is given back."""
        lease = holder.leases.pop(number, None)
        if lease is None or not lease.writing:
            return 0
        self._drop(lease.pages[written:])
        return self._index.commit(lease.pages[:written])

    def close(self, holder: Holder, number: int) -> None:
        lease = holder.leases.pop(number, None)
        if lease is None:
            return
        if lease.writing:
            self._drop(lease.pages)
        else:
            self._index.unpin(lease.pages)

    def _drop(self, pages: Sequence[Page]) -> None:
        self._index.give_up(pages)
        self._index.unpin(pages)

    def expire(self, now: float) -> None:
        for holder in self._holders:
            for number, lease in [item for item in holder.leases.items() if item[1].expires <= now]:
                self.expired += 1
                if lease.writing:
                    self._index.give_up(lease.pages)  # but still pinned: see above
                    lease.expires = float("inf")
                else:
                    self.close(holder, number)
