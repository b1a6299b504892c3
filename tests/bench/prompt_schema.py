"""What a prompt schema saves: time to the first token of prompts that use 3 of its 6 modules, against computing all of it.

    python -m tests.bench.prompt_schema [--tokens 1500] [--repeat 5] [--dtype auto]
    python -m tests.bench.prompt_schema --shape llama-3.1-8b --dtype bfloat16 --tokens 4096

A schema of so many tokens is registered anew for each round. `cold` is the first prompt of a schema; `same` the same choice
with another question; `beginning` another choice that begins with the same module; `other` one that begins elsewhere, of
modules that were used before. How far the answers differ: tests.bench.module_answers.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from itertools import count
from typing import Any

from aiohttp import ClientSession

from tests.mesh.client import Client
from tests.mesh.harness import RunningMesh

CASES = {"cold": "abc", "same": "abc", "beginning": "ade", "other": "bcd"}
WORDS = 12  # tokens of a sentence below, about
_fresh = count(1)


def schema(name: str, tokens: int) -> dict[str, Any]:
    """Six modules of equal length, which nobody has asked before."""
    sentences = range(tokens // 6 // WORDS)
    texts = {letter: "".join(f"{name} {letter} {at}: name the lock. " for at in sentences) for letter in "abcdef"}
    return {"name": name, "modules": [{"name": letter, "text": text} for letter, text in texts.items()]}


async def ttft_ms(client: Client, use: dict[str, Any]) -> tuple[float, int, int]:
    """Time to the first token, tokens of the prompt, and how many of them were found computed."""
    started, first = time.perf_counter(), 0.0
    question = f" Question {next(_fresh)}?"
    await client.send(
        "generate", "a", return_token_ids=True, prompt=question, prompt_schema=use, max_tokens=2, temperature=0, ignore_eos=True
    )
    while (frame := await client.frame())["type"] != "done":
        assert frame["type"] != "error", frame
        if frame["type"] == "token" and not first:
            first = 1000 * (time.perf_counter() - started)
    usage = frame["usage"]
    return first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", default="", help="random weights of a shape, on a GPU")
    given = parser.parse_args()
    took: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
    env = {"HEADRACE_DTYPE": given.dtype, "HEADRACE_MODEL_SHAPE": given.shape}
    async with RunningMesh(env=env) as mesh, Client(mesh.url) as client, ClientSession() as http:
        for turn in range(given.repeat + 1):
            for mode in ("exact", "modules"):
                name = f"{mode}{turn}"
                await (await http.post(f"{mesh.url}/v1/prompt_schemas", json=schema(name, given.tokens))).read()
                for case, modules in CASES.items():
                    use = {"name": name, "modules": list(modules), "mode": mode}
                    took.setdefault((mode, case), []).append(await ttft_ms(client, use))
    for (mode, case), found in took.items():
        medians = [round(statistics.median(column), 1) for column in zip(*found[1:], strict=True)]  # the first warms up
        row = dict(zip(("ttft ms", "prompt tokens", "found"), medians, strict=True))
        sys.stdout.write(json.dumps({"mode": mode, "case": case, **row}) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
