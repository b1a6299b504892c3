"""Which pages there are, who must not lose them, and which one goes next. Pure: no bytes, no clock, no I/O.

A page is named by its key: the engine's space and the chain hash, which stands for every token up to the page's end.

    absent -> writing -> ready -> absent        (reserve, commit, evict)
                  |         |
                  +-> gone <+                   (given up, spoiled; its slot comes back when nobody reads or writes it)

A page whose children are here stays: without it nobody could find them. So eviction takes chains from their ends.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(slots=True, eq=False)
class Page:
    key: bytes
    parent: bytes  # empty for the first of its chain
    depth: int  # pages before it in its chain
    slot: int
    ready: bool = False
    gone: bool = False  # no longer findable; the slot is free when `pins` is 0
    pins: int = 0  # leases that read or write it
    reads: int = 0
    worth: float = 0.0  # as it was when it was last written or read
    queued: bool = False


Worth = Callable[[Page, int, int], float]  # a page, the pages wanted so far, and the number of slots


class Index:
    def __init__(self, slots: int, worth: Worth) -> None:
        self.slots = slots
        self._worth = worth
        self._pages: dict[bytes, Page] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._children: Counter[bytes] = Counter()
        self._queue: list[tuple[float, bytes, Page]] = []  # a heap of what may go, by what it was worth when it came in
        self._wanted = 0
        self.evictions = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def pages(self) -> int:
        """Pages that can be found or are being written."""
        return len(self._pages)

    def find(self, keys: Iterable[bytes]) -> list[Page]:
        """The ready pages of the longest run from the start of a chain, pinned for the caller."""
        found: list[Page] = []
        for key in keys:
            page = self._pages.get(key)
            if page is None or not page.ready:
                break
            found.append(page)
        for page in found:
            page.pins += 1
            page.reads += 1
            page.worth = self._worth(page, self._wanted, self.slots)
        return found

    def reserve(self, keys: Sequence[bytes], most: int) -> list[Page | None]:
        """A new page, pinned for its writer, for each key of a chain that has none. It ends early where there is no room."""
        chain: list[Page | None] = []
        for at, key in enumerate(keys):
            page = None
            if key not in self._pages:
                page = self._new(key, keys[at - 1] if at else b"", at) if most else None
                if page is None:
                    break
                most -= 1
            chain.append(page)
        return chain

    def _new(self, key: bytes, parent: bytes, depth: int) -> Page | None:
        self._wanted += 1
        page = Page(key, parent, depth, slot=-1, pins=1)
        page.worth = self._worth(page, self._wanted, self.slots)
        if not self._free and not self._evict(page.worth):
            return None
        page.slot = self._free.pop()
        self._pages[key] = page
        self._children[parent] += 1
        return page

    def commit(self, pages: Sequence[Page]) -> int:
        """Written: others may find them, if they are not gone already. Returns how many they are."""
        ready = [page for page in pages if not page.gone]
        for page in ready:
            page.ready = True
        self.unpin(pages)
        return len(ready)

    def unpin(self, pages: Iterable[Page]) -> None:
        for page in pages:
            page.pins -= 1
            assert page.pins >= 0, "a page was let go of twice"
            if page.gone and not page.pins:
                self._free.append(page.slot)
            self._offer(page)

    def give_up(self, pages: Iterable[Page]) -> None:
        """Nobody shall find these pages. Their slots are free once nobody has them pinned."""
        for page in pages:
            if not page.gone:
                self._forget(page)
                if not page.pins:
                    self._free.append(page.slot)

    def known(self, keys: Iterable[bytes]) -> list[Page]:
        return [page for key in keys if (page := self._pages.get(key)) is not None and page.ready]

    # -- what goes next --------------------------------------------------------------------------------------------

    def _may_go(self, page: Page) -> bool:
        return page.ready and not page.gone and not page.pins and not self._children.get(page.key)

    def _offer(self, page: Page) -> None:
        """Queue a page that may go now. One that is read later stays where it is: it is put back when its turn comes."""
        if not page.queued and self._may_go(page):
            page.queued = True
            heappush(self._queue, (page.worth, page.key, page))

    def _evict(self, newcomer: float) -> bool:
        """Make room for a page of that worth. False: all that may go is worth more."""
        while self._queue:
            worth, _, page = self._queue[0]
            if worth == page.worth and self._may_go(page):
                break
            heappop(self._queue)
            page.queued = False
            self._offer(page)
        if not self._queue or self._queue[0][0] > newcomer:
            return False
        _, _, page = heappop(self._queue)
        self.evictions += 1
        self.give_up([page])
        return True

    def _forget(self, page: Page) -> None:
        page.gone = True
        del self._pages[page.key]
        self._children[page.parent] -= 1
        if not self._children[page.parent]:
            del self._children[page.parent]
            if (parent := self._pages.get(page.parent)) is not None:
                self._offer(parent)
