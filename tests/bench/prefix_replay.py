"""A recorded trace on two engines, with the shared prefix cache and without: hit rate, TTFT, output tokens/s.

    python -m tests.bench.prefix_replay TRACE.jsonl [--requests 1000] [--size-mb 1024] [--cache on off]
    python -m tests.bench.prefix_replay TRACE.jsonl --shape llama-3.1-8b --size-mb 32768 --scales 0.25 0.25 0.1 --processes 4

The mesh is real. Without --shape (random weights, on GPUs) its engines are tests.chain: a step of up to 128 tokens takes 20 ms
(6,400 tokens/s of prefill), so that two cores are enough; a block of the trace becomes 16 tokens, and its time a quarter. The
ideal is what one cache without end, and pages of whole blocks only, would find in these requests' prompts.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from services.bench.traces import Scaling, read, scale
from tests.bench.mesh_scale import bench
from tests.prefix_cache.meshes import EngineMesh

SCALES = (16 / 512, 0.02, 0.25)  # of input, output and time
LONGEST = 8192  # tokens of a prompt, and of a model's context with its answer some more


def ideal(trace: str, requests: int, input_scale: float) -> float:
    by = Scaling(input=input_scale, max_input=LONGEST)
    seen: set[int] = set()
    asked = found = 0
    with Path(trace).open() as lines:
        for arrival in read(trace, lines)[:requests]:
            scaled = scale(arrival, by)
            full = scaled.blocks[: scaled.input_tokens // scaled.block_size]
            found += scaled.block_size * next((at for at, block in enumerate(full) if block not in seen), len(full))
            asked += scaled.input_tokens
            seen |= set(full)
    return found / asked


async def replay(given: argparse.Namespace, cache: bool) -> dict[str, object]:
    env = {"HEADRACE_MODEL_SHAPE": given.shape, "HEADRACE_MAX_CONTEXT": str(LONGEST + 1024) if given.shape else "0"}
    env |= {} if cache else {"HEADRACE_ENGINE_PREFIX_CACHES": ""}
    load = ["--requests", str(given.requests), "--processes", str(given.processes), "--max-input", str(LONGEST)]
    for what, by in zip(("input", "output", "time"), given.scales, strict=True):
        load += [f"--{what}-scale", str(by)]
    async with EngineMesh(2, size_mb=given.size_mb, chain=not given.shape, env=env) as mesh:
        found = await bench(mesh.url, given.trace, *load, kind="trace")
        return {"cache": cache, **await mesh.found(), **found["summary"]}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--size-mb", type=int, default=1024)
    parser.add_argument("--shape", default="")
    parser.add_argument("--scales", type=float, nargs=3, default=SCALES, metavar=("INPUT", "OUTPUT", "TIME"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cache", nargs="+", choices=("on", "off"), default=["on", "off"])
    given = parser.parse_args()
    for setting in given.cache:
        row = await replay(given, setting == "on")
        sys.stdout.write(json.dumps({"ideal": ideal(given.trace, given.requests, given.scales[0]), **row}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
