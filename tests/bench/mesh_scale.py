"""How the CPU stages scale: output tokens/s through the whole mesh without a model, and prompts/s through the tokenizers.

    python -m tests.bench.mesh_scale [--streamers 1 2 4] [--tokenizers 1 2 4] [--users 256] [--processes 8]

Engines are tests.chain: real steps, real token log, no forward. So what is measured is the bus, the streamers and the door.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from typing import Any

from tests.mesh.harness import RunningMesh

TROUBLE = ("takeovers", "leases_lost", "restores", "preemptions", "steps")


async def bench(url: str, *arguments: str, kind: str = "closed") -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, "-m", "services.bench", kind, "--url", f"{url}/v1", "--json", out.name, *arguments]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        await process.wait()
        return dict(json.load(out))


async def measure(counts: dict[str, int], *arguments: str) -> dict[str, Any]:
    env = {"HEADRACE_ENGINE_MAX_RUNNING": "256", "HEADRACE_ENGINE_TOKEN_BUDGET": "16384"}
    async with RunningMesh(counts, chain=True, env=env, one_port=True) as mesh:
        found = await bench(mesh.url, *arguments)
        await asyncio.sleep(1.2)  # a heartbeat: what went wrong on the way
        beats = await mesh.bus.members()
        return found["summary"] | {name: sum(beat.counters.get(name, 0) for beat in beats) for name in TROUBLE}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streamers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokenizers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--users", default="128")
    parser.add_argument("--processes", default="4")
    given = parser.parse_args()
    load = ["--users", given.users, "--processes", given.processes]
    for n in given.streamers:
        counts = {"streamer": n, "engine": max(2, n), "tokenizer": 2}
        found = await measure(
            counts, *load, "--requests", str(8 * int(given.users)), "--input-tokens", "16", "--output-tokens", "256"
        )
        say({"streamers": n, "cores": os.cpu_count(), **found})
    for n in given.tokenizers:
        counts = {"streamer": 4, "engine": 4, "tokenizer": n}
        ask = ["--requests", str(8 * int(given.users)), "--input-tokens", "1000", "--output-tokens", "1", "--text"]
        found = await measure(counts, *load, *ask)
        say({"tokenizers": n, "cores": os.cpu_count(), **found})


def say(row: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
