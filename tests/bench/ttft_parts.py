"""A request's way to its first token, from every process's own timestamps: python -m tests.bench.ttft_parts [--tokens 512 2048]

    python -m tests.bench.ttft_parts --shape llama-3.1-8b --tokens 512 --context 9216        # random weights, on a GPU

One request at a time on an idle mesh, each a prompt of its own; medians, in milliseconds since the client sent it.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from itertools import count
from pathlib import Path

from shared import trace
from tests.mesh.client import Client
from tests.mesh.harness import RunningMesh

SETTLE_S = 5.0  # an engine gets ready for more than it was started with
WAKE = 20  # tokens of a request before each: a device that has rested begins at low clocks
_fresh = count(1)


async def asked(client: Client, tokens: int, wanted: int) -> tuple[int, int]:
    """When it was sent, and when its first token came."""
    prompt = [1000 + next(_fresh), *(2000 + 37 * at % 7919 for at in range(tokens - 1))]
    sent, first = trace.now_us(), 0
    await client.send("generate", "a", prompt=prompt, max_tokens=wanted, temperature=0, ignore_eos=True, return_token_ids=True)
    while (frame := await client.frame())["type"] != "done":
        if frame["type"] == "token":
            first = first or trace.now_us()
    return sent, first


async def requests(given: argparse.Namespace, folder: str) -> dict[int, list[tuple[int, int]]]:
    env = {"HEADRACE_TRACE": folder, "HEADRACE_MODEL_SHAPE": given.shape, "HEADRACE_MAX_CONTEXT": str(given.context)}
    async with RunningMesh(env=env) as mesh, Client(mesh.url) as client:
        await asyncio.sleep(SETTLE_S)
        found: dict[int, list[tuple[int, int]]] = {tokens: [] for tokens in given.tokens}
        for tokens in given.tokens * given.repeat:
            await asked(client, 8, WAKE)
            found[tokens].append(await asked(client, tokens, 2))
        await asyncio.sleep(trace.SETTLED_S)
    return found


def parts(spans: list[trace.Span], sent: int, first: int) -> dict[str, float]:
    """The first time that each thing was begun and ended, until the first token had come."""
    seen = {"the client has the first token": (first - sent) / 1000}
    for span in spans:
        if sent <= span.start <= first:
            what = f"{span.lane}: {span.name}"
            seen.setdefault(f"{what} begins", (span.start - sent) / 1000)
            seen.setdefault(f"{what} ends", (span.end - sent) / 1000)
    return seen


async def main() -> None:
    parser = argparse.ArgumentParser("tests.bench.ttft_parts", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[40])
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--shape", default="", help="random weights of a shape, on a GPU")
    parser.add_argument("--context", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = await requests(given, folder)
        spans = sorted(trace.read(Path(folder)), key=lambda span: span.start)
    for tokens, times in found.items():
        told: dict[str, list[float]] = {}
        for each in times:
            for what, ms in parts(spans, *each).items():
                told.setdefault(what, []).append(ms)
        sys.stdout.write(f"{tokens} tokens\n")
        for what, ms in sorted(told.items(), key=lambda pair: statistics.median(pair[1])):
            sys.stdout.write(f"  {statistics.median(ms):8.2f}  {what}\n")


if __name__ == "__main__":
    asyncio.run(main())
