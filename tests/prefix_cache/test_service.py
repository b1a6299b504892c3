"""The cache as a process, spoken to as engines do: what was committed comes back, and nothing else ever does."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from services.engine.prefix_client import CacheDown, Client, Lease
from services.prefix_cache.arena import Arena
from services.prefix_cache.service import listen
from services.prefix_cache.shelf import Shelf
from shared.blocks import chain
from shared.codec import frame
from shared.config import PrefixCacheConfig
from shared.fields import pack_ids
from shared.page import Label
from shared.prefix import MAX_WRITE, Find
from shared.stats import Stats
from tests.prefix_cache.meshes import PAGE, SLOTS, SPACE, CacheMesh, trouble, write

ROOT = Path(__file__).parents[2]
_fresh = count(1)


def prompt(blocks: int) -> tuple[list[bytes], list[bytes]]:
    """Hashes and packed token ids of a prompt that nobody has asked before."""
    ids = pack_ids([next(_fresh)] + [0] * (16 * blocks - 1))
    return chain(b"root", ids, 16), [ids[at : at + 64] for at in range(0, len(ids), 64)]


def payload(hash: bytes) -> bytes:
    return hash * (PAGE // len(hash))


def publish(client: Client, hashes: list[bytes], ids: list[bytes]) -> Lease:
    """Write all that the cache has room for; the caller commits."""
    lease = client.reserve(hashes)
    for at, slot in enumerate(lease.slots):
        if slot >= 0:
            write(client, lease, at, Label(SPACE, hashes[at], ids[at]), payload(hashes[at]))
    return lease


def put(client: Client, hashes: list[bytes], ids: list[bytes]) -> int:
    return client.commit(publish(client, hashes, ids), len(hashes))


def troubles(client: Client, lease: Lease, hashes: list[bytes], ids: list[bytes]) -> list[str]:
    """What is wrong with each page of a lease."""
    pages = client.read(lease, 0, len(lease.slots))
    return [trouble(pages, at, Label(SPACE, hashes[at], ids[at])) for at in range(len(lease.slots))]


@pytest.fixture(params=("memory", "network"))
def where(request: pytest.FixtureRequest, cache: CacheMesh) -> str:
    return cache.socket if request.param == "memory" else cache.listen


def test_what_is_committed_comes_back(cache: CacheMesh, where: str) -> None:
    hashes, ids = prompt(3)
    with cache.client(where) as client, cache.client() as other:
        assert (client.memory is not None) == where.startswith("/")
        lease = publish(client, hashes, ids)
        assert other.find(hashes).slots == (), "a page that is being written was found"
        assert client.commit(lease, 3) == 3
        for reader in (client, other):
            found = reader.find([*hashes, b"x" * 16])
            assert troubles(reader, found, hashes, ids) == ["", "", ""]
            reader.release(found)


def test_only_what_was_written(cache: CacheMesh, where: str) -> None:
    hashes, ids = prompt(3)
    with cache.client(where) as client:
        lease = publish(client, hashes, ids)
        assert client.commit(lease, 1) == 1
        assert client.commit(lease, 3) == 0, "a lease was committed twice"
        assert len(client.find(hashes).slots) == 1


def test_two_engines_publish_the_same(cache: CacheMesh) -> None:
    hashes, ids = prompt(3)
    with cache.client() as first, cache.client(cache.listen) as second:
        ours, theirs = publish(first, hashes[:2], ids), publish(second, hashes, ids)
        assert [slot >= 0 for slot in theirs.slots] == [False, False, True]
        assert second.commit(theirs, 1) == 1
        assert second.find(hashes).slots == ()
        assert first.commit(ours, 2) == 2
        assert troubles(second, second.find(hashes), hashes, ids) == ["", "", ""]


def test_eviction_under_read(cache: CacheMesh, where: str) -> None:
    """A leased page stays as it is, whoever else wants the room; so a full cache gives less room, or none."""
    hashes, ids = prompt(4)
    with cache.client(where) as reader, cache.client() as writer:
        put(writer, hashes, ids)
        lease = reader.find(hashes)
        assert put(writer, *prompt(SLOTS)) == SLOTS - 4
        assert sum(put(writer, *prompt(1)) for _ in range(9 * SLOTS)) == 9 * SLOTS
        assert troubles(reader, lease, hashes, ids) == [""] * 4
        reader.release(lease)
        assert reader.find(hashes).slots == lease.slots
    with cache.client() as writer:
        assert sum(put(writer, *prompt(1)) for _ in range(9 * SLOTS)) == 9 * SLOTS
        assert writer.find(hashes).slots == ()


def test_spoiled_pages_are_not_given_again(cache: CacheMesh, where: str) -> None:
    """An engine that wrote nonsense (or died while it wrote, and was believed) misleads nobody, and only once."""
    hashes, ids = prompt(3)
    with cache.client(where) as client:
        lease = client.reserve(hashes)
        for at, wrong in enumerate((payload(hashes[0]), payload(hashes[0]), payload(hashes[2]))):
            write(client, lease, at, Label(SPACE, hashes[at], ids[at]), payload(hashes[at]), wrong)
        assert client.commit(lease, 3) == 3
        assert troubles(client, client.find(hashes), hashes, ids) == ["", "checksum", ""]
        client.spoiled(hashes[1:2])
        assert len(client.find(hashes).slots) == 1
        assert put(client, hashes, ids) == 1
        assert troubles(client, client.find(hashes), hashes, ids) == [""] * 3


@pytest.mark.parametrize("fits", [True, False])
async def test_whoever_comes_while_memory_is_claimed_waits(tmp_path: Path, fits: bool) -> None:
    """A large cache takes seconds to begin; an engine that begins with it would lock its memory beside requests, later."""
    opening = asyncio.get_running_loop().create_future()
    [server] = await listen(PrefixCacheConfig(id="cache", socket=str(tmp_path / "socket")), opening)
    async with server:
        early = asyncio.create_task(asyncio.to_thread(Client, str(tmp_path / "socket"), SPACE, PAGE, 5))
        await asyncio.sleep(0.3)
        assert not early.done()
        if fits:
            opening.set_result(Shelf(Arena(1 << 20), 10, Stats()))
            (await early).close()
        else:
            opening.set_result(None)
            with pytest.raises(CacheDown):
                await early


def test_spaces_are_apart(cache: CacheMesh) -> None:
    """The same hashes under another fingerprint are other pages."""
    hashes, ids = prompt(1)
    with cache.client() as client:
        put(client, hashes, ids)
        other = Client(cache.socket, b"another-model-00", PAGE, 5)
        assert other.find(hashes).slots == ()
        other.close()


WRITER = """
import sys
from tests.prefix_cache.test_service import *
address, blocks = sys.argv[1], int(sys.argv[2])
client = Client(address, SPACE, PAGE, 5)
client.reserve(its_own(blocks)[0])
print("writing", flush=True)
sys.stdin.read()
"""


def its_own(blocks: int) -> tuple[list[bytes], list[bytes]]:
    """What that engine writes: no prompt of ours."""
    return chain(b"its own", pack_ids([0] * (16 * blocks)), 16), [pack_ids([0] * 16)] * blocks


async def writer(cache: CacheMesh, address: str, blocks: int) -> asyncio.subprocess.Process:
    """Another engine, in the middle of a write."""
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, address, str(blocks), stdin=pipe, stdout=pipe, cwd=ROOT
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"writing\n"
    return process


async def room(client: Client) -> int:
    """Slots to be had now, by asking for all of them and giving them back."""
    lease = await asyncio.to_thread(client.reserve, prompt(SLOTS)[0])
    await asyncio.to_thread(client.commit, lease, 0)
    return len(lease.slots)


async def until_room(client: Client, slots: int) -> None:
    async with asyncio.timeout(5):
        while True:
            if await room(client) >= slots:
                return
            await asyncio.sleep(0.05)


async def test_engine_killed_while_writing(cache: CacheMesh, where: str) -> None:
    process = await writer(cache, where, 7)
    with cache.client() as client:
        try:
            assert await room(client) == SLOTS - 7
        finally:
            process.kill()
            await process.wait()
        await until_room(client, SLOTS)


async def test_engine_stopped_while_writing(cache: CacheMesh) -> None:
    """Its lease runs out: others may write what it was writing, but never where it may still write."""
    process = await writer(cache, cache.socket, 7)
    process.send_signal(signal.SIGSTOP)
    hashes, ids = its_own(7)
    try:
        with cache.client() as client:
            await asyncio.sleep(2.5)  # the lease is for 1 s, and looked at each second
            assert client.reserve(hashes[:1]).slots[0] >= 0
            with cache.client() as other:
                assert put(other, hashes[1:], ids[1:]) == 6
                assert await room(client) <= SLOTS - 7, "a slot that a stopped process may write to was given away"
    finally:
        process.kill()
        await process.wait()
    with cache.client() as client:
        await until_room(client, SLOTS)


def test_write_room_is_bounded(cache: CacheMesh) -> None:
    with cache.client() as client:
        assert len(client.reserve(prompt(SLOTS)[0]).slots) == min(SLOTS, MAX_WRITE)
        assert client.reserve(prompt(1)[0]).slots == (), "nothing left, and what is being written is not evicted"


def test_another_page_size(cache: CacheMesh) -> None:
    with cache.client(), pytest.raises(CacheDown, match="slots of"), cache.client(page_bytes=PAGE * 2):
        pass


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", b"\0\0\0\1\0", frame(Find(hashes=b""))])
def test_noise_is_refused(cache: CacheMesh, noise: bytes) -> None:
    host, _, port = cache.listen.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as stranger:
        stranger.sendall(noise)
        assert b"refusal" in stranger.recv(1000)
    hashes, ids = prompt(1)
    with cache.client() as client:
        assert put(client, hashes, ids) == 1


async def test_killed_hung_and_empty_again() -> None:
    """Whatever happens to the cache, an engine is told within its patience, and the memory that it has mapped stays."""
    hashes, ids = prompt(2)
    async with CacheMesh() as own:
        with own.client() as client, own.client(own.listen) as remote:
            put(client, hashes, ids)
            lease = client.find(hashes)
            own.kill("prefix_cache-0", signal.SIGSTOP)
            started = time.monotonic()
            for hung in (client, remote):
                hung.limit(0.3)
                with pytest.raises(CacheDown):
                    await asyncio.to_thread(hung.find, hashes)
            assert time.monotonic() - started < 5
            own.kill("prefix_cache-0")
            assert troubles(client, lease, hashes, ids) == ["", ""], "memory that is mapped outlives its owner"
        async with asyncio.timeout(20):
            while True:
                try:
                    with own.client() as client:
                        assert client.find(hashes).slots == ()
                        assert put(client, hashes, ids) == 2
                        return
                except CacheDown:
                    await asyncio.sleep(0.1)
