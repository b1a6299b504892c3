"""The arena with its index and leases, and what happens on them: the state that all conversations share."""

import time
from typing import TYPE_CHECKING

from services.prefix_cache.arena import Arena
from services.prefix_cache.evict import worth
from services.prefix_cache.index import Index, Page
from services.prefix_cache.leases import Holder, Leases
from shared.blocks import HASH_BYTES
from shared.page import slot_bytes
from shared.prefix import MAX_WRITE, Commit, Committed, Find, Leased, Release, Reserve, Spoiled
from shared.stats import Stats

if TYPE_CHECKING:
    from services.prefix_cache.talk import Conversation

MAX_LEASES = 64  # of one conversation


class Full(Exception):
    """A conversation wants more than it may have; the message says what."""


class Shelf:
    def __init__(self, arena: Arena, lease_s: float, stats: Stats) -> None:
        self.arena, self.stats, self._lease_s = arena, stats, lease_s
        self.open: set[Conversation] = set()  # connections
        self._divide(0)  # until the first engine has said how large its pages are
        stats.gauges["pages"] = lambda: self.index.pages
        stats.gauges["slots"] = lambda: self.index.slots
        stats.gauges["used_bytes"] = lambda: (self.index.slots - self.index.free) * self.slot_bytes
        stats.gauges["engines"] = lambda: len(self.open)

    def _divide(self, slot: int) -> None:
        self.slot_bytes = slot
        self.index = Index(self.arena.size // slot if slot else 0, worth)
        self.leases = Leases(self.index, self._lease_s)

    def enter(self, page_bytes: int) -> Holder:
        """Divide the arena for pages of this size, unless others use it otherwise. Raises Full."""
        slot = slot_bytes(page_bytes)
        if slot != self.slot_bytes:
            if self.leases.holders:
                raise Full(f"the engines here have slots of {self.slot_bytes} bytes; yours would have {slot}")
            self._divide(slot)
        if not self.index.slots:
            raise Full(f"not one page of {page_bytes} bytes fits into {self.arena.size}")
        return self.leases.join()

    def find(self, holder: Holder, space: bytes, item: Find) -> Leased:
        keys = _keys(space, item.hashes)
        pages = self.index.find(keys)
        self.stats.counters["found_pages"] += len(pages)
        self.stats.counters["missed_pages"] += len(keys) - len(pages)
        return self._leased(holder, pages, [page.slot for page in pages], writing=False)

    def reserve(self, holder: Holder, space: bytes, item: Reserve) -> Leased:
        keys = _keys(space, item.hashes)
        before = self.index.evictions
        chain = self.index.reserve(keys, MAX_WRITE - holder.writing)
        self.stats.counters["evicted_pages"] += self.index.evictions - before
        self.stats.counters["refused_pages"] += len(keys) - len(chain)
        pages = [page for page in chain if page is not None]
        return self._leased(holder, pages, [-1 if page is None else page.slot for page in chain], writing=True)

    def _leased(self, holder: Holder, pages: list[Page], slots: list[int], writing: bool) -> Leased:
        if len(holder.leases) >= MAX_LEASES:
            raise Full(f"more than {MAX_LEASES} leases")
        return Leased(lease=self.leases.open(holder, pages, time.monotonic(), writing), slots=tuple(slots))

    def commit(self, holder: Holder, item: Commit) -> Committed:
        pages = self.leases.commit(holder, item.lease, item.pages)
        self.stats.counters["published_pages"] += pages
        return Committed(pages=pages)

    def release(self, holder: Holder, item: Release) -> None:
        self.leases.close(holder, item.lease)

    def spoiled(self, space: bytes, item: Spoiled) -> None:
        pages = self.index.known(_keys(space, item.hashes))
        self.stats.counters["spoiled_pages"] += len(pages)
        self.index.give_up(pages)

    def expire(self) -> None:
        self.leases.expire(time.monotonic())
        self.stats.counters["expired_leases"] = self.leases.expired


def _keys(space: bytes, hashes: bytes) -> list[bytes]:
    return [space + hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
