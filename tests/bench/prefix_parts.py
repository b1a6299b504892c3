"""A fetch from the prefix cache taken apart, without an engine: where the time goes from a lookup to pages that may be used.

    python -m tests.bench.prefix_parts [--pages 512] [--shape 32 16 16 128] [--portion-mb 16 64] [--ahead 2 4] [--device cpu]

The cache is a process of its own, its memory is mapped and locked as an engine's, and what runs is the engine's own code. The
default pages are those of 8,192 tokens of an 8B model (layers, tokens, key and value heads, head dimension; bfloat16). One JSON
line a part: medians, in ms for all pages and in GB/s of their bytes, nothing else being done; `begun` is when the host had
nothing left to do but wait.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch

from services.engine.ferry import HostFerry
from services.engine.plan import Ferry
from services.engine.prefix import Worth, labels
from services.engine.prefix_source import Fetcher, Source
from services.engine.prefix_storer import Storer
from shared.blocks import chain
from shared.fields import pack_ids
from shared.page import HEAD_BYTES, claim, slot_bytes
from shared.stats import Stats
from tests.prefix_cache.meshes import SPACE, CacheMesh

SPARE = 2  # blocks that no page comes to


class Bench:
    """Pages of a device, in a cache and to be brought back."""

    def __init__(self, given: argparse.Namespace, address: str) -> None:
        self.device, self.repeat = torch.device(given.device), given.repeat
        layers, size, heads, head_dim = given.shape
        self.pages = torch.randn(layers, given.pages + SPARE, size, heads, head_dim, device=self.device).to(torch.bfloat16)
        self.blocks = torch.randperm(given.pages).tolist()
        self.tokens = [at % 5000 for at in range(given.pages * size)]
        self.hashes, self.size = chain(b"root", pack_ids(self.tokens), size), size
        self.labels = labels(SPACE, self.hashes, self.tokens, 0, size)
        self.address, self.bytes = address, given.pages * self.pages[:, 0].nbytes

    def ferry(self, portion_mb: int = 64, ahead: int = 4) -> Ferry:
        if self.device.type == "cpu":
            return HostFerry(self.pages)
        from services.engine.gpu.ferry import GpuFerry
        from services.engine.gpu.transfer import Stream

        ferry = GpuFerry(self.pages, Stream(self.device), portion_bytes=portion_mb << 20, ahead=ahead)
        ferry.make_room()
        return ferry

    def ended(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, part: str, call: Callable[[], object], **more: object) -> None:
        """Say how long it takes until the device is done; a call that returns a time says by then what was begun."""
        took, begun = [], []
        for _ in range(self.repeat + 1):
            started = time.perf_counter()
            back = call()
            self.ended()
            took.append(1000 * (time.perf_counter() - started))
            begun.append(1000 * (back - started) if isinstance(back, float) else 0.0)
        ms, first = statistics.median(took[1:]), statistics.median(begun[1:])  # the first one warms up
        row = {"part": part, **more, "ms": round(ms, 3), "GB/s": round(self.bytes / ms / 1e6, 2)}
        say(row | ({"begun ms": round(first, 3)} if first else {}))

    def store(self) -> None:
        ferry, stored = self.ferry(), 0
        storer = Storer(Source(self.address, SPACE, ferry.page_bytes, None), Stats())
        ferry.follow()
        started = time.perf_counter()
        while stored < len(self.labels):
            offer = storer.reserve(self.hashes)
            assert offer is not None
            new = [at for at, slot in enumerate(offer.lease.slots) if slot >= 0]
            for first in range(0, len(new), ferry.portion):
                some = new[first : first + ferry.portion]
                for at, payload, its_sum in zip(some, *ferry.export([self.blocks[at] for at in some]), strict=True):
                    assert storer.write(offer, at, self.labels[at], payload, its_sum)
            storer.commit(offer, len(new))
            stored += len(new)
        say({"part": "store, once", "ms": round(1000 * (time.perf_counter() - started), 1)})
        storer.close()


def say(row: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def host_parts(bench: Bench, ferry: Ferry, fetcher: Fetcher, source: Source) -> None:
    bench.time("labels", lambda: labels(SPACE, bench.hashes, bench.tokens, 0, bench.size))

    def look_up() -> None:
        offer = fetcher.find(bench.labels)
        assert offer is not None and len(offer.lease.slots) == len(bench.labels)
        fetcher.release(offer)

    bench.time("lookup", look_up)
    lease = source.client(60).find(bench.hashes)
    pages = source.client(60).read(lease, 0, len(bench.labels))

    def headers() -> None:
        for at, label in enumerate(bench.labels):
            claim(pages.header(at), label, pages.size)

    bench.time("headers", headers)
    bench.time("follow", ferry.follow)
    source.client(60).release(lease)


def device_parts(bench: Bench, memory: memoryview, places: list[int]) -> None:
    """What a GPU does, each for itself: the link, by pages and by runs of them; putting pages away; summing them."""
    from kernels.page_sum import page_sum
    from services.engine.gpu.ferry import runs

    step, size = slot_bytes(bench.pages[:, 0].nbytes), bench.pages[:, 0].nbytes
    source = torch.frombuffer(memory, dtype=torch.uint8)
    staged = torch.empty(len(places), step, dtype=torch.uint8, device=bench.device)
    pieces = {f"link, up to {most} pages a copy": list(runs(places, step, most)) for most in (1, 4, 32, len(places))}
    for name, found in pieces.items():

        def copy(found: list[tuple[int, int, int]] = found) -> float:
            for at, first, count in found:
                part = (count - 1) * step + size
                staged.view(-1)[at * step : at * step + part].copy_(source[first : first + part], non_blocking=True)
            return time.perf_counter()

        bench.time(name, copy, copies=len(found))
    words, where = bench.pages.flatten(2).view(torch.int64), torch.tensor(bench.blocks, device=bench.device)
    new = staged[:, :size].view(torch.int64).unflatten(1, (len(words), -1)).transpose(0, 1)

    def put() -> None:
        words[:, where] = new

    bench.time("put away", put)
    bench.time("sums", lambda: page_sum(words, where))


def together(bench: Bench, memory: memoryview, places: list[int], fetcher_of: Callable[[Ferry], Fetcher],
             portions: list[int], aheads: list[int]) -> None:  # fmt: skip
    for portion_mb in portions:
        for ahead in aheads:
            ferry, shape = bench.ferry(portion_mb, ahead), {"portion MB": portion_mb, "ahead": ahead}
            fetcher, all_ahead = fetcher_of(ferry), bench.ferry(portion_mb, -(-len(places) // ferry.portion))

            def bring(ferry: Ferry = all_ahead) -> float:
                """All portions begun before one is waited for."""
                parts = [slice(at, at + ferry.portion) for at in range(0, len(places), ferry.portion)]
                cargoes = [ferry.bring(memory, places[part], bench.blocks[part]) for part in parts]
                begun = time.perf_counter()
                for cargo in cargoes:
                    cargo.sums()
                return begun

            def fetch(ferry: Ferry = ferry, fetcher: Fetcher = fetcher) -> None:
                """As an engine does it."""
                offer = fetcher.find(bench.labels)
                assert offer is not None
                ferry.follow()
                assert fetcher.bring(offer, bench.labels, bench.blocks) == len(bench.labels)
                fetcher.release(offer)

            if ahead == aheads[0]:
                bench.time("bring, all begun at once", bring, **shape | {"ahead": all_ahead.ahead})
            bench.time("fetch", fetch, **shape)
            del ferry, fetcher, all_ahead, bring, fetch  # and what they have staged


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--shape", type=int, nargs=4, default=[32, 16, 16, 128])
    parser.add_argument("--portion-mb", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--ahead", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeat", type=int, default=9)
    given = parser.parse_args()
    layers, size, heads, head_dim = given.shape
    room = 2 * (given.pages * slot_bytes(2 * layers * size * heads * head_dim) >> 20) + 64
    async with CacheMesh(size_mb=room) as mesh:
        bench = Bench(given, mesh.socket)
        bench.store()
        ferry = bench.ferry()
        source = Source(mesh.socket, SPACE, ferry.page_bytes, ferry)

        def fetcher_of(ferry: Ferry) -> Fetcher:
            return Fetcher([source], ferry, Worth(ferry.page_bytes, bench.size), Stats())

        with ExitStack() as ends:
            ends.callback(source.close)
            started = time.perf_counter()
            client = source.client(60)
            say({"part": "connect and lock, once", "ms": round(1000 * (time.perf_counter() - started), 1), "MB": room})
            memory, slots = client.memory, client.find(bench.hashes).slots
            assert memory is not None
            places = [slot * client.slot_bytes + HEAD_BYTES for slot in slots]
            say({"part": "all", "MB": bench.bytes >> 20, "pages": len(places), "device": str(bench.device)})
            host_parts(bench, ferry, fetcher_of(ferry), source)
            if bench.device.type == "cuda":
                device_parts(bench, memory, places)
            together(bench, memory, places, fetcher_of, given.portion_mb, given.ahead)
            say({"part": "export", "pages": ferry.portion} | exported(bench, ferry))


def exported(bench: Bench, ferry: Ferry) -> dict[str, object]:
    took = []
    for _ in range(bench.repeat):
        started = time.perf_counter()
        ferry.export(bench.blocks[: ferry.portion])
        took.append(time.perf_counter() - started)
    seconds = statistics.median(took)
    return {
        "ms": round(1000 * seconds, 3),
        "GB/s": round(len(bench.blocks[: ferry.portion]) * ferry.page_bytes / seconds / 1e9, 2),
    }


if __name__ == "__main__":
    asyncio.run(main())
