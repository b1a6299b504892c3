"""A recorded trace on two engines, with the shared prefix cache and without: hit rate, TTFT, output tokens/s.

    python -m tests.bench.prefix_replay TRACE.jsonl [--requests 1000] [--size-mb 1024] [--cache on off]

The mesh is real, its engines are tests.chain: a step of up to 128 tokens takes 20 ms (6,400 tokens/s of prefill), so that two
cores are enough. A block of the trace becomes 16 tokens, and its time a quarter. The ideal is what one cache without end, and
pages of whole blocks only, would find in these requests' prompts.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from services.bench.traces import Scaling, read, scale
from tests.bench.mesh_scale import bench
from tests.prefix_cache.meshes import EngineMesh

SCALES = {"--input-scale": 16 / 512, "--output-scale": 0.02, "--time-scale": 0.25}


def ideal(trace: str, requests: int) -> float:
    by = Scaling(input=SCALES["--input-scale"])
    seen: set[int] = set()
    asked = found = 0
    with Path(trace).open() as lines:
        for arrival in read(trace, lines)[:requests]:
            scaled = scale(arrival, by)
            full = scaled.blocks[: scaled.input_tokens // 16]
            found += 16 * next((at for at, block in enumerate(full) if block not in seen), len(full))
            asked += scaled.input_tokens
            seen |= set(full)
    return found / asked


async def replay(given: argparse.Namespace, cache: bool) -> dict[str, object]:
    env = {} if cache else {"HEADRACE_ENGINE_PREFIX_CACHES": ""}
    scales = [word for name, value in SCALES.items() for word in (name, str(value))]
    async with EngineMesh(2, size_mb=given.size_mb, env=env) as mesh:
        found = await bench(mesh.url, given.trace, "--requests", str(given.requests), *scales, kind="trace")
        await asyncio.sleep(1.2)  # a heartbeat: what they have counted
        beats = await mesh.bus.members()
    total = {
        name: sum(beat.counters.get(name, 0) for beat in beats)
        for name in ("cached_tokens", "prefix_fetched_tokens", "prompt_tokens")
    }
    return {"cache": cache, "hit rate": total["cached_tokens"] / total["prompt_tokens"], **total, **found["summary"]}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--size-mb", type=int, default=1024)
    parser.add_argument("--cache", nargs="+", choices=("on", "off"), default=["on", "off"])
    given = parser.parse_args()
    for setting in given.cache:
        row = await replay(given, setting == "on")
        sys.stdout.write(json.dumps({"ideal": ideal(given.trace, given.requests), **row}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
