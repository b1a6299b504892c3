"""What the shared prefix cache brings where many users have one system prompt: two engines, with the cache and without.

    python -m tests.bench.prefix_users [--users 64] [--common 2048] [--shape llama-3.1-8b] [--cache on off]

Every user asks again when answered, each time a prompt that begins like all others. An engine that has computed that beginning
keeps it anyway; what the cache adds is the first time on each engine. One JSON line a setting.
"""

import argparse
import asyncio
import json
import sys

from tests.bench.mesh_scale import bench
from tests.prefix_cache.meshes import EngineMesh

OWN, ANSWER = 64, 64  # tokens of a user's own question, and of the answer
ROUNDS = 8


async def measure(given: argparse.Namespace, cache: bool) -> dict[str, object]:
    env = {"HEADRACE_MODEL_SHAPE": given.shape, "HEADRACE_MAX_CONTEXT": str(given.common + 1024)}
    env |= {} if cache else {"HEADRACE_ENGINE_PREFIX_CACHES": ""}
    load = ["--users", str(given.users), "--requests", str(ROUNDS * given.users), "--processes", str(given.processes)]
    lengths = ["--input-tokens", str(given.common + OWN), "--common-tokens", str(given.common), "--output-tokens", str(ANSWER)]
    async with EngineMesh(2, size_mb=given.size_mb, chain=False, env=env) as mesh:
        found = await bench(mesh.url, *load, *lengths)
        return {"cache": cache, **await mesh.found(), **found["summary"]}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--common", type=int, default=2048, help="tokens that all prompts begin with")
    parser.add_argument("--shape", default="", help="random weights of a shape, on a GPU")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--size-mb", type=int, default=2048)
    parser.add_argument("--cache", nargs="+", choices=("on", "off"), default=["on", "off"])
    given = parser.parse_args()
    for setting in given.cache:
        sys.stdout.write(json.dumps(await measure(given, setting == "on")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
