"""What the shared prefix cache saves: time to the first token of a prompt, cold, warm in the engine, warm in the cache only.

    python -m tests.bench.prefix_ttft [--tokens 1500] [--repeat 5] [--tcp] [--dtype auto]
    python -m tests.bench.prefix_ttft --shape llama-3.1-8b --dtype bfloat16 --tokens 2048 8192 --size-mb 16384 --link 54

One engine with room for little more than one prompt: another prompt in between makes it forget. One client, medians; a short
request goes before each that is measured, for a device that has rested begins at low clocks. With
--link (GB/s from the host to the device) the floor of a fetch: its bytes at that speed.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from itertools import count
from typing import NamedTuple

from tests.mesh.client import Client
from tests.mesh.harness import free_port
from tests.prefix_cache.meshes import EngineMesh

CASES = ("cold", "engine", "cache")
SHORT, WAKE = 8, 40  # tokens of a short request and of its answer
_fresh = count(1)


def prompt(tokens: int) -> list[int]:
    return [1000 + next(_fresh), *(2000 + 37 * at % 7919 for at in range(tokens - 1))]


class Seen(NamedTuple):
    """Milliseconds to the first token, at the client; of these in the tokenizer, until the engine began, and of its steps."""

    ttft: float
    tokenize: float
    queue: float  # the fetch is in it
    prefill: float


async def ask(client: Client, tokens: list[int], wanted: int = 2) -> tuple[Seen, int]:
    """And how many tokens of the prompt were found."""
    started = time.perf_counter()
    given = {"prompt": tokens, "max_tokens": wanted, "temperature": 0, "ignore_eos": True}
    await client.send("generate", "a", **given, return_token_ids=True)  # so that a token without text is told as well
    first = 0.0
    while (frame := await client.frame())["type"] != "done":
        if frame["type"] == "token" and not first:
            first = 1000 * (time.perf_counter() - started)
    stages = (frame["timings"][f"{name}_ms"] for name in Seen._fields[1:])
    return Seen(first, *stages), frame["usage"]["prompt_tokens_details"]["cached_tokens"]


async def rounds(mesh: EngineMesh, tokens: int, repeat: int, store_s: float) -> dict[str, list[Seen]]:
    took: dict[str, list[Seen]] = {case: [] for case in CASES}
    async with Client(mesh.url) as client:
        for number in range(repeat + 1):
            asked = prompt(tokens)
            for case, between in (("cold", False), ("engine", False), ("cache", True)):
                if between:
                    await ask(client, prompt(tokens))
                await asyncio.sleep(store_s)  # what was computed is stored in the background
                await ask(client, prompt(SHORT), WAKE)
                seen, found = await ask(client, asked)
                # The first fetch from a cache ends when the prefill would have: its speed is not known yet.
                assert found == 0 if case == "cold" else found > 0.9 * tokens or not number, (case, found)
                took[case].append(seen)
    return {case: times[1:] for case, times in took.items()}  # the first round warms everything up


async def measure(given: argparse.Namespace, tokens: int) -> dict[str, object]:
    room = str(tokens + max(64, tokens // 8))
    env = {"HEADRACE_DTYPE": given.dtype, "HEADRACE_MODEL_SHAPE": given.shape}
    env |= {"HEADRACE_MAX_CONTEXT": room, "HEADRACE_ENGINE_KV_TOKENS": room}
    port = free_port() if given.tcp else 0
    caches = f"127.0.0.1:{port}" if given.tcp else ""
    async with EngineMesh(1, size_mb=given.size_mb, caches=caches, port=port, chain=False, env=env) as mesh:
        took = await rounds(mesh, tokens, given.repeat, 1 + tokens / (20_000 if given.shape else 4_000))
        await asyncio.sleep(1.2)  # a heartbeat
        beats = await mesh.bus.members()
    medians = {case: round(statistics.median(seen.ttft for seen in times), 1) for case, times in took.items()}
    stages = {
        case: {name: round(statistics.median(getattr(seen, name) for seen in times), 1) for name in Seen._fields[1:]}
        for case, times in took.items()
    }
    row: dict[str, object] = {
        "tokens": tokens,
        "ttft_ms": medians,
        "of which": stages,
        "cache / cold": round(medians["cache"] / medians["cold"], 3),
    }
    if given.link:
        slots = {beat.stage: beat.gauges for beat in beats}["prefix_cache"]
        page = given.size_mb * (1 << 20) // slots["slots"]
        row["floor ms"] = round(1000 * (tokens // 16) * page / (1e9 * given.link), 2)
    fetches = [beat.histograms["prefix_fetch"] for beat in beats if "prefix_fetch" in beat.histograms]
    row["fetch ms"] = round(1000 * sum(each.total for each in fetches) / sum(sum(each.counts) for each in fetches), 1)
    return row | {"all": {case: [round(seen.ttft, 1) for seen in times] for case, times in took.items()}}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1500])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", default="", help="random weights of a shape, on a GPU")
    parser.add_argument("--size-mb", type=int, default=2048)
    parser.add_argument("--link", type=float, default=0.0)
    parser.add_argument("--tcp", action="store_true", help="as from another host, over the loopback")
    given = parser.parse_args()
    for tokens in given.tokens:
        sys.stdout.write(json.dumps(await measure(given, tokens)) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
