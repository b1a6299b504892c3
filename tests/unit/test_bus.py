"""The bus against a real broker: groups, pending lists, leases, hand-over, records, and what happens when it goes away."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest

from services.engine.publish import Publisher
from services.up.broker import Broker
from shared.bus import GONE_MS, KEEP_S, START, Bus, entry_order
from shared.connection import AT_ONCE, BusDown, patiently
from shared.messages import Attach, Beat, Cancel, Fail, Message, Record, Sampling, Step, Submit
from shared.readers import Group, Tail


@pytest.fixture
def broker() -> Iterator[Broker]:
    broker = Broker()
    process = subprocess.Popen(broker.command)
    yield broker
    process.kill()
    process.wait()
    broker.remove()


@pytest.fixture
async def bus(broker: Broker) -> AsyncIterator[Bus]:
    bus = Bus(broker.url, "test", patience_s=5)
    await bus.incarnation()  # the broker is up from here on
    yield bus
    await bus.close()


def note(generation: int) -> Cancel:
    return Cancel(request="r", generation=generation)


async def test_what_was_queued_before_the_group_is_served(bus: Bus) -> None:
    await bus.append("s", note(1))
    group = Group(bus, "s", "g", "c")
    seen = [delivery for _ in range(3) for delivery in await group.read(10)]
    assert [(delivery.message, delivery.again) for delivery in seen] == [(note(1), False)]
    await group.ack([seen[0].entry])
    assert await bus.depths(["s"]) == [0]
    await group.close()


async def test_a_consumer_that_comes_back_finds_what_was_its_own(bus: Bus) -> None:
    for generation in range(3):
        await bus.append("s", note(generation))
    first = Group(bus, "s", "g", "c")
    while not await first.read(10):
        pass
    second = Group(bus, "s", "g", "c")
    again = await second.read(10)
    assert [delivery.again for delivery in again] == [True] * 3
    await first.close()
    await second.close()


async def test_leases(bus: Bus) -> None:
    """What is refreshed stays ours; what is handed on or taken over does not."""
    for generation in range(2):
        await bus.append("s", note(generation))
    mine, other = Group(bus, "s", "g", "mine"), Group(bus, "s", "g", "other")
    entries: list[str] = []
    while len(entries) < 2:
        entries += [delivery.entry for delivery in await mine.read(10)]
    assert await other.stale(10) == []
    assert await mine.refresh(entries) == set(entries)
    await asyncio.sleep(3.1)
    taken = await other.stale(1)
    assert [delivery.entry for delivery in taken] == entries[:1]
    await other.hand_on(entries[:1], [("s", note(9))])
    assert await mine.refresh(entries) == set(entries[1:])
    [new] = [delivery for _ in range(3) for delivery in await other.read(10) if not delivery.again]
    assert new.message == note(9)
    assert entry_order(new.entry) > entry_order(entries[1])
    for group in (mine, other):
        await group.close()


async def test_entries_of_a_reader_that_died_are_inherited_at_once(bus: Bus) -> None:
    """Its connections end with it; one that lives and is merely busy keeps what it has."""
    for generation in range(2):
        await bus.append("s", note(generation))
    dies, lives, other = (Group(bus, "s", "g", name) for name in ("dies", "lives", "other"))
    taken = [[delivery.entry for _ in range(3) for delivery in await group.read(1)][:1] for group in (dies, lives)]
    await dies.close()
    await asyncio.sleep(GONE_MS / 1000 + 0.1)
    assert [delivery.entry for delivery in await other.stale(10)] == taken[0]
    assert await lives.refresh(taken[1]) == set(taken[1])
    for group in (lives, other):
        await group.close()


async def test_what_is_not_ours_goes_to_dead(bus: Bus) -> None:
    await bus.run([("XADD", "s", "*", "m", b"\xc1junk"), ("XADD", "s", "*", "other", b"x")])
    await bus.append("s", note(1))
    group = Group(bus, "s", "g", "c")
    seen = [delivery.message for _ in range(3) for delivery in await group.read(10)]
    assert seen == [note(1)]
    assert await bus.depths([bus.names.dead, "s"]) == [2, 1]
    await group.close()


async def test_flushall_is_healed(bus: Bus) -> None:
    group = Group(bus, "s", "g", "c")
    await group.read(1)
    await bus.run([("FLUSHALL",)])
    await bus.append("s", note(5))
    seen = [delivery.message for _ in range(4) for delivery in await group.read(10)]
    assert seen == [note(5)]
    await group.close()


async def test_two_find_at_once_that_their_group_is_gone(bus: Bus) -> None:
    """As after a flush: one of them creates it, and the other is told that it exists."""
    groups = [Group(bus, "s", "g", f"c{at}") for at in range(2)]
    await asyncio.gather(*(group._create() for group in groups))
    await bus.append("s", note(1))
    assert [d.message for _ in range(2) for group in groups for d in await group.read(10)] == [note(1)]
    for group in groups:
        await group.close()


@pytest.mark.parametrize("atomic", [False, True])
async def test_a_full_broker_is_waited_for(bus: Bus, atomic: bool) -> None:
    limit = ("CONFIG", "SET", "maxmemory")
    await bus.run([(*limit, "1")])
    write = asyncio.create_task(bus.run([("SET", "k", "v"), ("GET", "k")], atomic=atomic))
    with pytest.raises(BusDown, match="maxmemory"):
        await bus.run([("SET", "k", "w")], patience_s=0, atomic=atomic)
    await bus.run([(*limit, "0")])
    assert (await write)[1] == b"v"


async def test_what_the_log_tells_of_one_request(bus: Bus) -> None:
    notes = [Attach(request="ab"[at % 2], connection=at) for at in range(500)]
    entries = [await bus.append("s", Step(records=(each, each))) for each in notes]
    await bus.run([("XADD", "s", "*", "m", b"\xc1 a b"), ("XADD", "s", "*", "other", b"a")])
    for after, until in ((99, 400), (0, 99), (400, 400)):
        said, newest = await bus.told("s", "a", entries[after], entries[until])
        assert said == [(entries[at], notes[at]) for at in range(after + 1, until + 1) if at % 2 == 0 for _ in range(2)]
        assert newest == entries[until]
    assert len((await bus.told("s", "b", START))[0]) == 500
    assert await bus.told("s", "ab", entries[0], entries[9]) == ([], entries[9])


async def test_tail(bus: Bus) -> None:
    entries = [await bus.append("s", note(generation)) for generation in range(1200)]
    tail = Tail(bus, {"s": entries[1150], "other": START})
    await bus.append("other", note(7))
    seen: list[tuple[str, int]] = []
    while len(seen) < 50:
        seen += [(stream, item.generation) for stream, _, item in await tail.read() if isinstance(item, Cancel)]
    assert ("other", 7) in seen
    assert [generation for stream, generation in seen if stream == "s"] == list(range(1151, 1200))
    await tail.close()


def record(request: str) -> Record:
    submit = Submit(
        request=request, tenant="t", partition="p", log_from=START, generation=0, given=(), ends=(),
        prompt="x", sampling=Sampling(), max_tokens=None, deadline_ms=0,
    )  # fmt: skip
    return Record(submit=submit, stop=("a",), connection=1)


async def test_record_is_compared_and_set(bus: Bus) -> None:
    first = record("r")
    assert await bus.load("r") is None
    assert await bus.change("r", lambda now: first if now is None else None) == first
    assert await bus.change("r", lambda now: first if now is None else None) is None
    assert await bus.load("r") == first

    def higher(now: Record | None) -> Record:
        assert now is not None
        return now.model_copy(update={"connection": now.connection + 1})

    def notes(record: Record) -> list[tuple[str, Message]]:
        return [("s", Step(records=(Attach(request="r", connection=record.connection),)))]

    said = await asyncio.gather(*(bus.change("r", higher, notes) for _ in range(10)))
    assert sorted(each.connection for each in said if each) == list(range(2, 12))
    told, _ = await bus.told("s", "r", START)
    assert [record for _, record in told] == [Attach(request="r", connection=connection) for connection in range(2, 12)]


async def test_every_token_log_ends(bus: Bus) -> None:
    """Whoever begins one may die right after, and its streamer with it."""
    streams = [bus.names.tokens(name) for name in ("appended", "changed", "handed on", "published")]
    step = Step(records=())
    await bus.append(streams[0], step)
    await bus.change("r", lambda _: record("r"), lambda _: [(streams[1], step)])
    group = Group(bus, "s", "g", "c")
    await group.hand_on([], [(streams[2], step)])
    publisher = Publisher(bus, group)
    publisher.put("published", Fail(request="r", epoch=(0, 1, 0), code="cancelled", text=""))
    sending = asyncio.create_task(publisher.work())
    await publisher.flushed()
    assert all(0 < ttl <= KEEP_S for ttl in await bus.run([("TTL", stream) for stream in streams]))
    sending.cancel()
    await group.close()


async def test_a_change_whose_reply_was_lost_is_asked_again(bus: Bus) -> None:
    """The transaction went through and nobody heard so: what was written counts as somebody's."""
    assert await bus.swap("k", None, [("SET", "k", "mine")])
    assert not await bus.swap("k", None, [("SET", "k", "mine")])
    assert await bus.swap("k", b"mine", [("SET", "k", "next")])


async def test_a_flush_is_another_incarnation(bus: Bus) -> None:
    before = await bus.incarnation()
    assert await bus.incarnation() == before
    await bus.run([("FLUSHALL",)])
    assert await bus.incarnation() != before


async def test_members_come_and_go(bus: Bus) -> None:
    beat = Beat(
        stage="engine", id="e", pid=1, host="h", ready=True, detail="", counters={}, gauges={}, histograms={}
    )  # fmt: skip
    await bus.beat(beat)
    assert await bus.members() == [beat]
    await bus.leave("engine", "e")
    assert await bus.members() == []


async def test_no_broker_is_one_clear_error() -> None:
    bus = Bus("unix:///nowhere/broker.sock", "test", patience_s=0.2)
    with pytest.raises(BusDown, match="broker"):
        await bus.depths(["s"])
    await bus.close()


async def test_a_cancellation_that_the_library_forgets_counts() -> None:
    """As `wait_for` does before Python 3.12, when what it waits for ends at that moment."""

    async def forgets() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "sent"

    async def asks() -> str:
        return await patiently(forgets, AT_ONCE)

    task = asyncio.create_task(asks())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
