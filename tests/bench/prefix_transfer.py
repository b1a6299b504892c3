"""How fast pages move: through the host's memory and over TCP (the loopback), verified; and when fetching them pays.

    python -m tests.bench.prefix_transfer [--page-bytes 737280] [--block 16] [--pages 128] [--prefill 1600 20000]

The default page is a block of SmolLM2 at float32; 2097152 is one of an 8B model with 8 key heads in bfloat16. For each prefill
speed (tokens/s) the break-even length is where fetching takes as long as computing: beyond it fetching is faster.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time

from services.engine.prefix_client import Client
from shared.blocks import chain
from shared.fields import pack_ids
from shared.page import Label
from tests.prefix_cache.meshes import SPACE, CacheMesh, trouble, write

PIECE = 16


def store(client: Client, labels: list[Label], payload: bytes) -> None:
    lease = client.reserve([label.hash for label in labels])
    for at, label in enumerate(labels):
        write(client, lease, at, label, payload)
    assert client.commit(lease, len(labels)) == len(labels)


def fetch(client: Client, labels: list[Label]) -> float:
    """Seconds until all pages are here and verified."""
    started = time.perf_counter()
    lease = client.find([label.hash for label in labels])
    for at in range(0, len(labels), PIECE):
        wanted = labels[at : at + PIECE]
        pages = client.read(lease, at, len(wanted))
        assert not any(trouble(pages, nth, label) for nth, label in enumerate(wanted))
    took = time.perf_counter() - started
    client.release(lease)
    return took


def measure(client: Client, labels: list[Label], page_bytes: int) -> dict[str, float]:
    payload = os.urandom(page_bytes)
    started = time.perf_counter()
    store(client, labels, payload)
    stored = time.perf_counter() - started
    size = len(labels) * page_bytes / 1e9
    fetched = statistics.median(fetch(client, labels) for _ in range(5))
    one = statistics.median(fetch(client, labels[:1]) for _ in range(50))
    return {"store GB/s": size / stored, "fetch GB/s": size / fetched, "one page ms": 1000 * one}


def break_even(found: dict[str, float], page_bytes: int, block: int, prefill: float) -> float | None:
    """Tokens; None where prefill is faster at any length."""
    per_token = page_bytes / block / (1e9 * found["fetch GB/s"])
    wait = found["one page ms"] / 1000 - block * per_token
    gain = 1 / prefill - per_token
    return max(0.0, wait / gain) if gain > 0 else None


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--page-bytes", type=int, default=737_280)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--prefill", type=float, nargs="+", default=[1600, 20_000])
    given = parser.parse_args()
    size = 3 * given.pages * (given.page_bytes + 8192) >> 20
    async with CacheMesh(size_mb=size) as mesh:
        for name, address in (("memory", mesh.socket), ("tcp", mesh.listen)):
            ids = pack_ids([at + len(name) for at in range(given.pages * given.block)])
            hashes, width = chain(b"", ids, given.block), 4 * given.block
            labels = [Label(SPACE, hash, ids[at * width : (at + 1) * width]) for at, hash in enumerate(hashes)]
            with mesh.client(address, page_bytes=given.page_bytes) as client:
                found = measure(client, labels, given.page_bytes)
            even = {f"{speed:g}": break_even(found, given.page_bytes, given.block, speed) for speed in given.prefill}
            row = {"over": name, **{key: round(value, 3) for key, value in found.items()}}
            sys.stdout.write(json.dumps(row | {"break-even tokens, by prefill tokens/s": even}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
