"""The README's CPU figures: SmolLM2 through the whole mesh, and llama.cpp on the same file and cores in the same run.

    python -m tests.bench.cpu_figures [--repeat 3] [--llama-python OTHER_ENV/bin/python] [--llama-server PATH]

Output tokens/s at 1, 8 and 32 streams (64 in, 128 out), prompt tokens/s (512 in, 1 out), what the mesh adds to TTFT, idle CPU,
memory. llama.cpp is driven through its C API by tests/bench/peer_llamacpp.py, in an environment that has llama-cpp-python, and
as a server (tests/bench/peer_llama_server.py says how to build it) by the load generator that drives us: the C API, without a
server or a client on the same cores, is the harder peer.

`decode` is how many tokens/s the streams get while they decode, `served` what a run gives in all, prompts and ends included.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import psutil

from shared.config import bundled_model
from tests.bench.mesh_scale import bench, say
from tests.bench.peer_llama_server import running
from tests.mesh.client import Answer, Client
from tests.mesh.harness import RunningMesh

STREAMS = (1, 8, 32)
IDLE_S = 20.0


async def served(url: str, users: int) -> dict[str, float]:
    lengths = ["--input-tokens", "64", "--output-tokens", "128", "--requests", str(2 * users if users > 1 else 4)]
    summary = (await bench(url, "--users", str(users), *lengths, "--fresh"))["summary"]
    assert not summary["failures"], summary["failures"]
    return {f"decode {users}": users / summary["tpot"]["p50"], f"served {users}": summary["throughput"]}


async def prompts(url: str) -> dict[str, float]:
    one = await bench(url, "--users", "1", "--requests", "8", "--input-tokens", "512", "--output-tokens", "1", "--fresh")
    return {"prompt": 512 / one["summary"]["ttft"]["p50"]}


async def ours(mesh: RunningMesh) -> dict[str, float]:
    found: dict[str, float] = {}
    for users in STREAMS:
        found |= await served(mesh.url, users)
    return found | await prompts(mesh.url)


async def their_server(program: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for users in STREAMS:
        async with running(program, users) as url:
            found |= await served(url, users)
    async with running(program, 1, context=1024) as url:
        return found | await prompts(url)


async def theirs(python: str) -> dict[str, float]:
    command = [python, "tests/bench/peer_llamacpp.py", bundled_model(), "--repeat", "1", "--output-tokens", "128"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    out, _ = await process.communicate()
    rows = [json.loads(line) for line in out.decode().splitlines() if line.startswith("{")]
    found: dict[str, float] = {}
    for row in rows:
        name = "prompt" if row["what"].startswith("prompt") else f"decode {row['streams']}"
        found[name] = max(found.get(name, 0.0), row["tokens_per_s"])
    return found


async def overhead(mesh: RunningMesh) -> dict[str, float]:
    """TTFT at the client less the engine's own time, one request at a time."""
    added: list[float] = []
    async with Client(mesh.url) as client:
        for number in range(60):
            started, first, answer = time.perf_counter(), 0.0, Answer()
            question = [{"role": "user", "content": f"What is {number} plus {number + 3}?"}]
            await client.send("generate", f"a{number}", messages=question, max_tokens=2, temperature=0, ignore_eos=True)
            while not answer.terminals:
                answer.take(await client.frame())
                first = first or (time.perf_counter() if answer.frames else 0.0)
            added.append(1000 * (first - started) - answer.done["timings"]["prefill_ms"])
    return {"overhead_ms_p50": statistics.median(added), "overhead_ms_p95": sorted(added)[57]}


async def at_rest(mesh: RunningMesh) -> dict[str, Any]:
    processes = {name: psutil.Process(child.process.pid) for name, child in mesh.children.items() if child.process}
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    await asyncio.sleep(IDLE_S)
    used = {name: (sum(process.cpu_times()[:2]) - before[name]) / IDLE_S * 100 for name, process in processes.items()}
    memory = {name: round(process.memory_info().rss / 1e6) for name, process in processes.items()}
    return {"idle_percent_of_a_core": round(sum(used.values()), 2), "memory_mb": memory}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 1) for name in (runs[0] if runs else {})}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--llama-python", default="")
    parser.add_argument("--llama-server", default="")
    given = parser.parse_args()
    mine: list[dict[str, float]] = []
    peers: dict[str, list[dict[str, float]]] = {"llama.cpp": [], "llama-server": []}
    for _ in range(given.repeat):  # in turn, so that a slow minute of the machine hits all
        async with RunningMesh() as mesh:
            mine.append(await ours(mesh))
            if len(mine) == 1:
                say({"what": "at rest", **await overhead(mesh), **await at_rest(mesh)})
        if given.llama_python:
            peers["llama.cpp"].append(await theirs(given.llama_python))
        if given.llama_server:
            peers["llama-server"].append(await their_server(given.llama_server))
    say({"what": "headrace, tokens/s", **medians(mine)})
    for name, runs in peers.items():
        say({"what": f"{name}, tokens/s", **medians(runs)})
        ratios = {what: round(medians(mine)[what] / value, 2) for what, value in medians(runs).items()}
        say({"what": f"ratio to {name}", **ratios})


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
