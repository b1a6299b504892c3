"""Engines that share a prefix cache, as processes: it makes prompts cheaper, and no fault of it changes a token.

The chain engine's pages hold the tokens themselves, and every token depends on the whole context as read from the pages: one
wrong page would change all that follows.
"""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from typing import get_args

import pytest

from shared.messages import Beat
from tests.chain import expected
from tests.mesh.client import Answer, Client
from tests.mesh.harness import free_port
from tests.prefix_cache.meshes import EngineMesh
from tests.prefix_cache.proxy import Fault, Proxy

_fresh = count(1)


def prompt(length: int) -> list[int]:
    """One that nobody has asked before."""
    return [1000 + next(_fresh), *(2000 + at % 7919 for at in range(length - 1))]


async def check(mesh: EngineMesh, tokens: list[int], output: int = 8) -> int:
    """The answer is right. Returns how much of the prompt was found computed."""
    async with Client(mesh.url) as client:
        await client.send("generate", "a", prompt=tokens, max_tokens=output, ignore_eos=True, return_token_ids=True)
        answer = await client.follow(Answer())
    assert answer.done["type"] == "done", answer.done
    assert answer.ids[0] == expected(tokens, output)
    return int(answer.done["usage"]["prompt_tokens_details"]["cached_tokens"])


async def counted(mesh: EngineMesh, name: str, stage: str = "engine") -> float:
    """Over all processes of a stage, once they have shown themselves."""
    await asyncio.sleep(1.2)
    beats: list[Beat] = [beat for beat in await mesh.bus.members() if beat.stage == stage]
    return sum(beat.counters.get(name, 0) for beat in beats)


async def stored(mesh: EngineMesh, pages: int) -> None:
    async with asyncio.timeout(10):
        while await counted(mesh, "published_pages", "prefix_cache") < pages:
            pass


async def test_a_new_engine_finds_what_another_computed() -> None:
    async with EngineMesh(1) as mesh:
        tokens = prompt(1000)
        assert await check(mesh, tokens) == 0
        await stored(mesh, 1000 // 16)
        await mesh.forget()
        assert await check(mesh, [*tokens, 7, 8, 9]) == 1000 // 16 * 16
        assert await check(mesh, [*tokens, 7, 8, 9]) == 1000 // 16 * 16, "now from its own pages"
        assert await counted(mesh, "prefix_fetched_tokens") == 1000 // 16 * 16


async def test_nobody_waits_while_a_caches_memory_is_locked() -> None:
    """Which takes a GPU seconds. A restarted cache is met beside requests, which are computed, and stored afterwards."""
    async with EngineMesh(1, env={"CHAIN_PIN_S": "3"}) as mesh:
        mesh.kill("prefix_cache-0")
        await mesh.until_ready()
        until = time.monotonic() + 4
        while time.monotonic() < until:
            async with asyncio.timeout(2):
                assert await check(mesh, tokens := prompt(600)) == 0
        await stored(mesh, 600 // 16)
        await mesh.forget()
        assert await check(mesh, tokens) == 599 // 16 * 16


async def test_what_many_miss_comes_once() -> None:
    async with EngineMesh(1) as mesh:
        tokens = prompt(1000)
        await check(mesh, tokens)
        await stored(mesh, 1000 // 16)
        await mesh.forget()
        found = await asyncio.gather(*(check(mesh, [*tokens, 7, 8, 9 + user]) for user in range(6)))
        assert found == [1000 // 16 * 16] * 6
        assert await counted(mesh, "prefix_fetched_tokens") == 1000 // 16 * 16


FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass
class Remote:
    """An engine whose cache is behind a network that can be made bad, and what the cache holds: a prompt for each fault."""

    mesh: EngineMesh
    proxy: Proxy
    prompts: dict[Fault, list[int]]


@pytest.fixture(scope="module")
async def remote() -> AsyncIterator[Remote]:
    port = free_port()
    with Proxy(f"127.0.0.1:{port}") as proxy:
        async with EngineMesh(1, caches=proxy.address, port=port) as mesh:
            prompts = {fault: prompt(1000) for fault in FAULTS}
            for tokens in prompts.values():
                await check(mesh, tokens)
            await stored(mesh, len(prompts) * (1000 // 16))
            yield Remote(mesh, proxy, prompts)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_bad_network(remote: Remote, fault: Fault) -> None:
    """What arrived whole and in time is used; the rest is computed. Nobody waits for longer than computing it takes."""
    mesh, proxy, tokens = remote.mesh, remote.proxy, remote.prompts[fault]
    await mesh.forget()
    proxy.breaks(fault)
    async with asyncio.timeout(10):
        found = await check(mesh, tokens)
    assert (found == 1000 // 16 * 16) if not fault else found < 500
    proxy.breaks("")
    assert await counted(mesh, "prefix_spoiled") == (fault == "flip")
    async with asyncio.timeout(10):
        await check(mesh, prompt(200))


async def test_a_drained_engine_hands_its_pages_over() -> None:
    async with EngineMesh(2) as mesh:
        tokens = prompt(800)
        asking = asyncio.create_task(check(mesh, tokens, output=160))  # 3 s at least
        async with asyncio.timeout(10):
            while True:
                busy = next((beat.id for beat in await mesh.bus.members() if beat.counters.get("output_tokens", 0) > 1), "")
                if busy:
                    break
                await asyncio.sleep(0.1)
        mesh.kill(busy, signal.SIGTERM)
        await asking
        other = next(beat for beat in await mesh.bus.members() if beat.stage == "engine" and beat.id != busy)
        assert other.counters.get("prefix_fetched_tokens", 0) >= 800 // 16 * 16


async def test_faults_of_the_cache_under_load() -> None:
    """Killed, stopped and too small, and an engine killed while all of them read and write: every token is right."""
    chance, over = random.Random(4), asyncio.Event()
    async with EngineMesh(2, size_mb=2) as mesh:
        systems = [prompt(400) for _ in range(6)]

        async def user() -> None:
            while not over.is_set():
                await check(mesh, [*chance.choice(systems), *prompt(chance.randrange(1, 60))])

        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(user())
            await asyncio.sleep(1)
            mesh.kill("prefix_cache-0")
            await asyncio.sleep(1)
            await _until_fetched(mesh)
            mesh.kill("prefix_cache-0", signal.SIGSTOP)
            await asyncio.sleep(1)
            mesh.kill("prefix_cache-0", signal.SIGCONT)
            over.set()
        assert await counted(mesh, "prefix_failures") > 0
        await mesh.drained()


async def _until_fetched(mesh: EngineMesh) -> None:
    """A new engine may have computed everything before the cache, new as well, had any of it: then the next one is asked."""
    while True:
        await mesh.forget()
        for _ in range(5):
            if await counted(mesh, "prefix_fetched_tokens"):
                return
