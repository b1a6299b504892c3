"""Engines' pages through a real prefix cache: what arrives in the device is verified there, and any fault is a miss."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch import Tensor

from services.engine.ferry import HostFerry
from services.engine.plan import Ferry
from services.engine.prefix import Worth
from services.engine.prefix_source import Fetcher, Offer, Source, ahead
from services.engine.prefix_storer import Storer
from shared.blocks import chain
from shared.fields import pack_ids
from shared.page import HEAD_BYTES, Label
from shared.stats import Stats
from tests.engine.gpu.test_ferry import DEVICE, on_gpu
from tests.prefix_cache.meshes import SPACE, CacheMesh

SHAPE = (3, 20, 8, 2, 24)
PAGES = 7  # of a chain: three portions and a half
Make = Callable[[Tensor], Ferry]
_fresh = count(1)


@pytest.fixture(scope="module")
async def cache() -> AsyncIterator[CacheMesh]:
    async with CacheMesh() as running:
        yield running


class Reader:
    """An engine's pages, and what it knows of a cache."""

    def __init__(self, make: Make, device: torch.device, address: str) -> None:
        self.pages = torch.zeros(SHAPE, device=device)
        self.ferry, self.stats = make(self.pages), Stats()
        self.ferry.make_room()
        self.source = Source(address, SPACE, self.ferry.page_bytes, self.ferry)
        self.fetcher = Fetcher([self.source], self.ferry, Worth(self.ferry.page_bytes, 8), self.stats)

    def found(self, labels: list[Label]) -> Offer:
        offer = self.fetcher.find(labels)
        assert offer is not None and len(offer.lease.slots) == PAGES
        return offer

    def bring(self, labels: list[Label], blocks: list[int]) -> int:
        offer = self.found(labels)
        self.ferry.follow()
        good = self.fetcher.bring(offer, labels, blocks)
        self.fetcher.release(offer)
        return good


def labelled() -> list[Label]:
    """A chain that nobody has asked for before."""
    ids = pack_ids([next(_fresh)] + [0] * (8 * PAGES - 1))
    return [Label(SPACE, hash, ids[32 * at : 32 * at + 32]) for at, hash in enumerate(chain(b"root", ids, 8))]


def store(make: Make, device: torch.device, address: str, labels: list[Label], blocks: list[int]) -> Tensor:
    """The pages of an engine that stored them, summed where they were."""
    pages = torch.randn(SHAPE, device=device)
    ferry = make(pages)
    storer = Storer(Source(address, SPACE, ferry.page_bytes, None), Stats())
    offer = storer.reserve([label.hash for label in labels])
    assert offer is not None
    ferry.make_room()
    ferry.follow()
    for first in range(0, len(blocks), ferry.portion):
        some = slice(first, first + ferry.portion)
        for at, (label, payload, payload_sum) in enumerate(zip(labels[some], *ferry.export(blocks[some]), strict=True)):
            assert storer.write(offer, first + at, label, payload, payload_sum)
    storer.commit(offer, len(labels))
    storer.close()
    return pages[:, blocks]


@contextmanager
def reading(make: Make, device: torch.device, address: str) -> Iterator[Reader]:
    reader = Reader(make, device, address)
    try:
        yield reader
    finally:
        reader.fetcher.close()


@contextmanager
def offered(make: Make, device: torch.device, cache: CacheMesh) -> Iterator[tuple[Reader, Offer, list[Label], Tensor]]:
    """What a cache on this host has; and the pages as they were stored."""
    labels = labelled()
    wanted = store(make, device, cache.socket, labels, THERE)
    with reading(make, device, cache.socket) as reader:
        yield reader, reader.found(labels), labels, wanted


BLOCKS, THERE = [3, 1, 19, 8, 0, 7, 12], [4, 5, 6, 11, 2, 9, 18]
WAYS = pytest.mark.parametrize(("make", "device"), [(HostFerry, torch.device("cpu")), (on_gpu, DEVICE)])


@WAYS
@pytest.mark.parametrize("near", [True, False], ids=["memory", "network"])
def test_what_was_stored_arrives(make: Make, device: torch.device, near: bool, cache: CacheMesh) -> None:
    address, labels = cache.socket if near else cache.listen, labelled()
    wanted = store(make, device, address, labels, THERE)
    with reading(make, device, address) as reader:
        assert reader.bring(labels, BLOCKS) == PAGES
        assert torch.equal(reader.pages[:, BLOCKS], wanted)
        others = [block for block in range(SHAPE[1]) if block not in BLOCKS]
        assert not reader.pages[:, others].any()
        assert reader.bring(labels[:PAGES], BLOCKS) == PAGES
        assert not reader.stats.counters["prefix_spoiled"]


@WAYS
@pytest.mark.parametrize("seed", range(6))
def test_a_bit_flips(make: Make, device: torch.device, seed: int, cache: CacheMesh) -> None:
    """Anywhere in what is used of a page: it and those behind it are misses, and the cache gives it to nobody again."""
    chance = random.Random(seed)
    with offered(make, device, cache) as (reader, offer, labels, wanted):
        bad = chance.randrange(PAGES)
        memory = offer.client.memory
        assert memory is not None
        used = 92 + 32 + 8 if seed % 3 == 0 else 0  # of the header, if not of the payload
        at = chance.randrange(used) if used else HEAD_BYTES + chance.randrange(reader.ferry.page_bytes)
        memory[offer.lease.slots[bad] * offer.client.slot_bytes + at] ^= 1 << chance.randrange(8)
        assert reader.fetcher.bring(offer, labels, BLOCKS) == bad
        assert torch.equal(reader.pages[:, BLOCKS[:bad]], wanted[:, :bad])
        assert reader.stats.counters["prefix_spoiled"] == 1
        reader.fetcher.release(offer)
        again = reader.fetcher.find(labels)
        assert (0 if again is None else len(again.lease.slots)) == bad


@WAYS
def test_pages_change_places(make: Make, device: torch.device, cache: CacheMesh) -> None:
    """Two payloads swapped under their headers: both are well-formed pages, and neither is the one that it is said to be."""
    with offered(make, device, cache) as (reader, offer, labels, _):
        memory, size = offer.client.memory, offer.client.slot_bytes
        assert memory is not None
        second, fifth = (slice(offer.lease.slots[at] * size + HEAD_BYTES, (offer.lease.slots[at] + 1) * size) for at in (2, 5))
        memory[second], memory[fifth] = bytes(memory[fifth]), bytes(memory[second])
        assert reader.fetcher.bring(offer, labels, BLOCKS) == 2
        assert reader.stats.counters["prefix_spoiled"] == 1


@WAYS
def test_time_is_over(make: Make, device: torch.device, cache: CacheMesh) -> None:
    with offered(make, device, cache) as (reader, offer, labels, _):
        offer.deadline = 0.0
        assert reader.fetcher.bring(offer, labels, BLOCKS) == 0
        assert not reader.pages.any() and not reader.stats.counters["prefix_spoiled"]


def test_ahead() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for item in range(5):
            begun.append(item)
            yield item

    for item in ahead(items(), 2):
        assert begun == list(range(min(item + 3, 5)))
    assert list(ahead(items(), 0)) == list(range(5))
