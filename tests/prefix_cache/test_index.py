"""Index and leases under random engines: no slot is ever shared, leaked or taken from under a reader or a writer.

The model beside them is a dictionary: which pages were committed and not lost since. Whatever is found must be in it.
"""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.prefix_cache.evict import worth
from services.prefix_cache.index import Index, Page, Worth
from services.prefix_cache.leases import Holder, Leases

SLOTS = 6
LEASE_S = 10.0

chains = st.lists(st.integers(0, 1), min_size=1, max_size=5)  # two branches at each step: shared prefixes are common
steps = st.lists(
    st.tuples(
        st.sampled_from(("find", "reserve", "commit", "close", "spoil", "leave", "tick")),
        st.integers(0, 2),  # which engine
        chains,
        st.integers(0, 5),
    ),
    max_size=60,
)


def lru(page: Page, clock: int, slots: int) -> float:
    return clock


def keys(chain: list[int]) -> list[bytes]:
    return [bytes(chain[: at + 1]) for at in range(len(chain))]


@dataclass
class Engine:
    holder: Holder
    reading: dict[int, list[Page]] = field(default_factory=dict)
    writing: dict[int, list[Page]] = field(default_factory=dict)


class World:
    def __init__(self, policy: Worth) -> None:
        self.index = Index(SLOTS, policy)
        self.leases = Leases(self.index, LEASE_S)
        self.engines = [Engine(self.leases.join()) for _ in range(3)]
        self.now = 0.0

    def find(self, engine: Engine, chain: list[int], _: int) -> None:
        pages = self.index.find(keys(chain))
        assert [page.key for page in pages] == keys(chain)[: len(pages)]
        assert all(page.ready and not page.gone for page in pages)
        if number := self.leases.open(engine.holder, pages, self.now, writing=False):
            engine.reading[number] = pages

    def reserve(self, engine: Engine, chain: list[int], most: int) -> None:
        before = {page.slot for page in self._busy()}
        given = self.index.reserve(keys(chain), most)
        pages = [page for page in given if page is not None]
        assert len(pages) <= most
        assert not before & {page.slot for page in pages}, "a slot that somebody reads or writes was given away"
        if number := self.leases.open(engine.holder, pages, self.now, writing=True):
            engine.writing[number] = pages

    def _busy(self) -> list[Page]:
        """Pages that an engine may be touching: read leases that hold, and all writes, expired or not."""
        held = [engine.holder.leases for engine in self.engines]
        return [page for leases in held for lease in leases.values() for page in lease.pages]

    def commit(self, engine: Engine, _: list[int], written: int) -> None:
        if engine.writing:
            number, pages = engine.writing.popitem()
            alive = [page for page in pages[:written] if not page.gone]
            assert self.leases.commit(engine.holder, number, written) == len(alive)
            assert all(page.ready for page in alive)

    def close(self, engine: Engine, _: list[int], which: int) -> None:
        mine = [*engine.reading, *engine.writing]
        if mine:
            number = mine[which % len(mine)]
            engine.reading.pop(number, None)
            engine.writing.pop(number, None)
            self.leases.close(engine.holder, number)

    def spoil(self, _: Engine, chain: list[int], __: int) -> None:
        self.index.give_up(self.index.known(keys(chain)[-1:]))
        assert not self.index.known(keys(chain)[-1:])

    def leave(self, engine: Engine, _: list[int], __: int) -> None:
        self.leases.leave(engine.holder)
        engine.reading.clear()
        engine.writing.clear()
        engine.holder = self.leases.join()

    def tick(self, _: Engine, __: list[int], seconds: int) -> None:
        self.now += seconds
        self.leases.expire(self.now)

    def check(self) -> None:
        in_use = [page.slot for page in self.index._pages.values()]
        gone = {page.slot for page in self._busy() if page.gone}
        taken = sorted([*in_use, *gone, *self.index._free])
        assert taken == list(range(SLOTS)), "a slot leaked, or has two owners"


@settings(max_examples=400, deadline=None)
@given(steps, st.sampled_from((worth, lru)))
def test_no_slot_is_shared_leaked_or_pulled_away(plan: list[tuple[str, int, list[int], int]], policy: Worth) -> None:
    world = World(policy)
    for action, who, chain, number in plan:
        getattr(world, action)(world.engines[who], chain, number)
        world.check()
    for engine in world.engines:
        world.leave(engine, [], 0)
    assert world.index.free + world.index.pages == SLOTS
    if policy is lru:
        assert len(world.index.reserve(keys([2, 2, 2, 2, 2, 2]), SLOTS)) == SLOTS, "all of it is to be had again"


def filled(chain: list[int], slots: int = SLOTS) -> Index:
    index = Index(slots, lru)
    index.commit([page for page in index.reserve(keys(chain), slots) if page is not None])
    return index


def test_a_chain_goes_from_its_end() -> None:
    index = filled([1, 1, 1, 1], slots=4)
    index.reserve(keys([0, 0]), 2)
    assert len(index.find(keys([1, 1, 1, 1]))) == 2


def test_two_writers_of_one_chain() -> None:
    """The second gets only what the first is not writing, and the first one's failure leaves no hole behind."""
    index = Index(SLOTS, lru)
    first = index.reserve(keys([1, 1]), 9)
    second = index.reserve(keys([1, 1, 1]), 9)
    assert [page is None for page in second] == [True, True, False]
    index.commit([page for page in second if page is not None])
    index.give_up(page for page in first if page is not None)
    index.unpin(page for page in first if page is not None)
    assert index.find(keys([1, 1, 1])) == [], "a page whose parents are absent is not found"
    index.commit([page for page in index.reserve(keys([1, 1]), 9) if page is not None])
    assert len(index.find(keys([1, 1, 1]))) == 3


@given(st.lists(st.tuples(st.booleans(), chains), max_size=40))
def test_the_one_worth_least_goes(plan: list[tuple[bool, list[int]]]) -> None:
    """The lazy queue's choice is the one that a look at all pages would find."""
    index = Index(SLOTS, worth)
    for reading, chain in plan:
        if reading:
            index.unpin(index.find(keys(chain)))
            continue
        free = index.free
        able = [page for page in index._pages.values() if index._may_go(page)]
        least = min((page.worth for page in able), default=None)
        [given] = index.reserve(keys(chain)[:1], 1) or [None]
        if given is not None and not free:
            assert least is not None
            assert [page.worth for page in able if page.gone] == [least]
        index.commit([given] if given is not None else [])
        index.commit([page for page in index.reserve(keys(chain), 9) if page is not None])


def test_a_scan_does_not_wash_out_what_is_read() -> None:
    slots = 1000
    index = Index(slots, worth)
    index.commit([page for page in index.reserve(keys([1] * 200), 200) if page is not None])
    for scan in range(2, 100):
        index.unpin(index.find(keys([1] * 200)))
        index.commit([page for page in index.reserve(keys([scan] * 200), 200) if page is not None])
    assert len(index.find(keys([1] * 200))) == 200


def test_nothing_stays_for_its_past_alone() -> None:
    index = Index(100, worth)
    index.commit([page for page in index.reserve(keys([1] * 10), 10) if page is not None])
    for _ in range(20):
        index.unpin(index.find(keys([1] * 10)))
    for scan in range(600):
        key = [scan // 250 + 2, scan % 250]
        index.commit([page for page in index.reserve(keys(key), 9) if page is not None])
    assert index.find(keys([1] * 10)) == []
