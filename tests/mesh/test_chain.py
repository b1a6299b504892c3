"""Two of each stage, engines whose every token depends on its whole context: what the client gets is exactly the chain.

One lost, doubled, reordered or spliced token would change all that follow it.
"""

import asyncio
import random
import signal
import time
from typing import Any

import pytest

from tests.chain import expected, logprob
from tests.mesh.client import Answer, Client, generate
from tests.mesh.harness import RunningMesh


def body(prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "return_token_ids": True, "ignore_eos": True, **more}


def check(answer: Answer, prompt: list[int], tokens: int, n: int = 1) -> None:
    assert answer.done["type"] == "done", answer.done
    for choice in range(n):
        assert answer.ids[choice] == expected(prompt, tokens, choice)
    assert answer.done["usage"]["completion_tokens"] == n * tokens
    assert answer.done["usage"]["prompt_tokens"] == len(prompt)
    assert answer.done["finish_reasons"] == ["length"] * n


async def crowd(mesh: RunningMesh, users: int, tokens: int, seed: int) -> list[tuple[list[int], "asyncio.Task[Answer]"]]:
    """Users on both streamers, some with shared prefixes, all under way."""
    rng = random.Random(seed)
    shared = [rng.randrange(1000, 40000) for _ in range(40)]
    started = []
    for user in range(users):
        prompt = shared[: rng.randrange(0, 40)] + [rng.randrange(1000, 40000) for _ in range(rng.randrange(1, 60))]
        started.append((prompt, asyncio.create_task(generate(mesh.url_of(user % 2), **body(prompt, tokens)))))
    await asyncio.sleep(0.3)
    return started


async def test_many_at_once(chain_mesh: RunningMesh) -> None:
    for prompt, task in await crowd(chain_mesh, users=48, tokens=60, seed=1):
        check(await task, prompt, 60)
    await chain_mesh.drained()


@pytest.mark.parametrize("n", [2, 5])
async def test_choices_share_their_prompt(chain_mesh: RunningMesh, n: int) -> None:
    prompt = list(range(2000, 2000 + 37))
    check(await generate(chain_mesh.url, **body(prompt, 45, n=n)), prompt, 45, n)


async def test_long_prompts_are_chunked(chain_mesh: RunningMesh) -> None:
    prompt = [1000 + at * 7 % 30000 for at in range(3000)]
    check(await generate(chain_mesh.url, **body(prompt, 20)), prompt, 20)
    again = await generate(chain_mesh.url_of(1), **body(prompt, 20))
    check(again, prompt, 20)


async def test_logprobs_go_on_after_an_engine_is_killed(chain_mesh: RunningMesh) -> None:
    asked = body([7, 8, 9], 300, logprobs=1)
    answer = asyncio.create_task(chain_mesh.post("/v1/completions", asked))
    await asyncio.sleep(0.4)
    chain_mesh.kill("engine-0")
    chain_mesh.kill("engine-1")
    status, reply = await answer
    assert status == 200, reply
    told = reply["choices"][0]["logprobs"]["token_logprobs"]
    assert told == [logprob(context) for context in range(3, 303)]


async def test_resume_on_the_other_streamer(chain_mesh: RunningMesh) -> None:
    """The first socket is gone (or half-open) mid-stream; the cursor continues on a streamer that never saw the request."""
    prompt, answer = [5000, 6000, 7000], Answer()
    async with Client(chain_mesh.url_of(0)) as first:
        await first.send("generate", "a", **body(prompt, 300))
        await first.follow(answer, frames=20)
        async with Client(chain_mesh.url_of(1)) as second:
            started = time.monotonic()
            await second.send("resume", "b", request=answer.request, cursor=answer.cursor, return_token_ids=True)
            await second.follow(answer, frames=1)
            assert time.monotonic() - started < 1.0, "resume takes at most a second"
            await second.follow(answer)
        told = Answer()
        while not told.terminals:
            told.take(await first.frame())
        assert told.done["code"] == "superseded"
    check(answer, prompt, 300)


async def test_resume_again_and_again(chain_mesh: RunningMesh) -> None:
    prompt, answer, hops = [5001, 6001], Answer(), 0
    async with Client(chain_mesh.url) as first:
        await first.send("generate", "a", **body(prompt, 250, n=2))
        await first.follow(answer, frames=8)
    while not answer.terminals:
        hops += 1
        async with Client(chain_mesh.url_of(hops % 2)) as client:
            await client.send("resume", "b", request=answer.request, cursor=answer.cursor, return_token_ids=True)
            await client.follow(answer, frames=60)
    assert hops > 2
    check(answer, prompt, 250, n=2)


async def test_resume_after_the_end_and_from_the_start(chain_mesh: RunningMesh) -> None:
    prompt = [42, 43, 44]
    first = await generate(chain_mesh.url_of(0), **body(prompt, 30))
    for cursor, known in ((first.cursor, 30), ("", 0)):
        answer = Answer()
        async with Client(chain_mesh.url_of(1)) as client:
            await client.send("resume", "b", request=first.request, cursor=cursor, return_token_ids=True)
            await client.follow(answer)
        assert answer.ids.get(0, []) == expected(prompt, 30)[known:]
        assert answer.done["usage"]["completion_tokens"] == 30


async def test_a_foreign_cursor_is_refused(chain_mesh: RunningMesh) -> None:
    first = await generate(chain_mesh.url, **body([1, 2, 3], 10))
    cases = [
        (first.request, "10.deadbeef", "stream_lost"),
        (first.request, "4000.deadbeef", "stream_lost"),
        (first.request, "x", "bad_cursor"),
        (first.request, "1-2.deadbeef", "bad_cursor"),
        ("0" * 32, "", "stream_lost"),
    ]
    async with Client(chain_mesh.url) as client:
        for request, cursor, code in cases:
            await client.send("resume", "r", request=request, cursor=cursor)
            assert (await client.frame())["code"] == code, cursor


async def test_cancel_frees_pages(chain_mesh: RunningMesh) -> None:
    async with Client(chain_mesh.url) as client:
        for id in ("a", "b", "c"):
            await client.send("generate", id, **body([9, 9, 9], 4000))
        answers = {id: Answer() for id in ("a", "b", "c")}
        while min(answer.frames for answer in answers.values()) < 3:
            frame = await client.frame()
            answers[frame["id"]].take(frame)
        started = time.monotonic()
        for id in answers:
            await client.send("cancel", id)
        while not all(answer.terminals for answer in answers.values()):
            frame = await client.frame()
            answers[frame["id"]].take(frame)
        await chain_mesh.drained()
        assert time.monotonic() - started < 2.5  # the gauges are one heartbeat behind
    for answer in answers.values():
        assert answer.done["finish_reasons"] == ["cancelled"]
        assert answer.done["usage"]["completion_tokens"] == len(answer.ids[0])
        assert answer.ids[0] == expected([9, 9, 9], len(answer.ids[0]))


async def test_http_client_that_leaves_has_cancelled(chain_mesh: RunningMesh) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await chain_mesh.post("/v1/completions", body([8, 8], 4000))
    await chain_mesh.drained()


@pytest.mark.parametrize("name", ["engine-0", "tokenizer-0", "broker"])
async def test_kill_minus_nine(chain_mesh: RunningMesh, name: str) -> None:
    """Any one process dies while everybody streams; nobody notices more than a pause."""
    users = await crowd(chain_mesh, users=24, tokens=250, seed=hash(name) % 1000)
    chain_mesh.kill(name)
    for prompt, task in await asyncio.wait_for(asyncio.gather(*(_with(p, t) for p, t in users)), 60):
        check(task, prompt, 250)
    await chain_mesh.until_ready()
    await chain_mesh.drained()


async def _with(prompt: list[int], task: "asyncio.Task[Answer]") -> tuple[list[int], Answer]:
    return prompt, await task


async def test_a_drained_engine_hands_its_requests_on(chain_mesh: RunningMesh) -> None:
    users = await crowd(chain_mesh, users=16, tokens=250, seed=5)
    chain_mesh.kill("engine-1", signal.SIGTERM)
    for prompt, task in users:
        check(await task, prompt, 250)
    await chain_mesh.until_ready()


async def test_a_zombie_engine_is_fenced(chain_mesh: RunningMesh) -> None:
    """Stopped for longer than its lease, then awake again: the other engine has taken over, and its late words mean nothing."""
    users = await crowd(chain_mesh, users=16, tokens=400, seed=6)
    chain_mesh.kill("engine-0", signal.SIGSTOP)
    await asyncio.sleep(4.5)
    chain_mesh.kill("engine-0", signal.SIGCONT)
    for prompt, task in users:
        check(await task, prompt, 400)
    await chain_mesh.until_ready()
    await chain_mesh.drained()


async def test_a_streamer_dies_and_its_clients_go_on_elsewhere(chain_mesh: RunningMesh) -> None:
    prompt, answer = [3, 1, 4, 1, 5], Answer()
    async with Client(chain_mesh.url_of(0)) as first:
        await first.send("generate", "a", **body(prompt, 300))
        await first.follow(answer, frames=15)
        chain_mesh.kill("streamer-0")
        async with Client(chain_mesh.url_of(1)) as second:
            await second.send("resume", "a", request=answer.request, cursor=answer.cursor, return_token_ids=True)
            await second.follow(answer)
    check(answer, prompt, 300)
    await chain_mesh.until_ready()


async def test_one_xadd_per_step_and_partition(chain_mesh: RunningMesh) -> None:
    """The broker's load grows with steps, not with tokens."""
    names = chain_mesh.bus.names
    [keys] = await chain_mesh.bus.run([("KEYS", names.tokens("*"))])
    before = sum(await chain_mesh.bus.depths([key.decode() for key in keys]))
    users = [asyncio.create_task(generate(chain_mesh.url, **body([7, user], 50))) for user in range(32)]
    for task in users:
        await task
    after = sum(await chain_mesh.bus.depths([key.decode() for key in keys]))
    assert after - before < 32 * 50 / 3
