"""compose/users.acl against a live broker: each stage can do its work as its own user, and nothing of the others'."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.bus import Bus
from shared.connection import BusDown, Refused
from tests.mesh.client import Answer, Client, generate
from tests.mesh.harness import RunningMesh
from tests.mesh.test_chain import body, check

NOBODY: list[tuple[Any, ...]] = [
    ("FLUSHALL",), ("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory", "1"), ("KEYS", "*"), ("SCAN", "0"), ("SAVE",),
    ("EVAL", "return 1", "0"), ("SCRIPT", "LOAD", "return 1"), ("FUNCTION", "LIST"), ("SHUTDOWN",),
    ("CLIENT", "LIST"), ("CLIENT", "KILL", "ID", "1"), ("ACL", "LIST"), ("MODULE", "LIST"), ("REPLICAOF", "h", "1"),
    ("PUBLISH", "hr:{m}:here:engines:x", "x"), ("SET", "other", "x"), ("GET", "other"), ("XTRIM", "work", "MAXLEN", 0),
]  # fmt: skip
FIELDS = ("*", "m", "x")


def forbidden(bus: Bus) -> dict[str, list[tuple[Any, ...]]]:
    """What each stage must not do with the names of the mesh."""
    names = bus.names
    record, tokens, quota = names.record("r"), names.tokens("p"), names.quota("k", "requests:1")
    read_group = ("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "STREAMS")
    return {
        "tokenizer": [
            ("GET", record), ("SET", record, "x"), ("XRANGE", tokens, "-", "+"), (*read_group, names.work, ">"),
            ("XADD", names.control, *FIELDS), ("GET", quota), ("SET", names.member("engine", "e"), "x"),
        ],
        "engine": [
            ("GET", record), ("SET", record, "x"), (*read_group, names.submit, ">"), ("XADD", names.submit, *FIELDS),
            ("XADD", names.control, *FIELDS), ("GET", names.ticket("t")), ("GET", names.schemas("t")),
            ("SET", names.member("streamer", "s"), "x"),
        ],
        "streamer": [
            (*read_group, names.work, ">"), ("XADD", names.work, *FIELDS), ("XDEL", names.work, "1-0"),
            ("XRANGE", names.submit, "-", "+"), ("XREAD", "COUNT", 1, "STREAMS", names.control, "0"),
            ("SET", names.member("engine", "e"), "x"), ("XRANGE", names.dead, "-", "+"),
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
async def mesh() -> AsyncIterator[RunningMesh]:
    counts = {"tokenizer": 2, "engine": 2, "streamer": 2}
    async with RunningMesh(counts, chain=True, env={"CHAIN_STEP_S": "0.004"}, users=True) as running:
        yield running


@pytest.mark.parametrize("stage", ["health", "tokenizer", "engine", "streamer"])
async def test_what_a_stage_must_not_do(mesh: RunningMesh, stage: str) -> None:
    bus = Bus(mesh.url_as(stage), mesh.bus.names.model, patience_s=1)
    own = forbidden(bus)
    for command in NOBODY + own.get(stage, [each for commands in own.values() for each in commands]):
        with pytest.raises(Refused, match="permission"):
            await bus.run([command])
    await bus.close()


async def test_who_names_no_user_can_do_nothing(mesh: RunningMesh) -> None:
    bus = Bus(mesh.broker.url, mesh.bus.names.model, patience_s=0)
    for command in (("PING",), *NOBODY):
        with pytest.raises(BusDown, match="uthentication"):
            await bus.run([command])
    await bus.close()


async def test_each_stage_can_do_its_work(mesh: RunningMesh) -> None:
    """Serving, taking over, resuming elsewhere, restoring after a flush, cancelling: all as the stages' own users."""
    prompt, answer = [11, 22, 33], Answer()
    async with Client(mesh.url_of(0)) as first:
        await first.send("generate", "a", **body(prompt, 400))
        await first.follow(answer, frames=10)
    async with Client(mesh.url_of(1)) as second:
        await second.send("resume", "a", request=answer.request, cursor=answer.cursor, return_token_ids=True)
        await second.follow(answer, frames=10)
        mesh.kill("engine-0")
        await second.follow(answer, frames=10)
        await mesh.bus.run([("FLUSHALL",)])
        await second.follow(answer)
    check(answer, prompt, 400)
    async with Client(mesh.url) as client:
        await client.send("generate", "b", **body([1], 4000))
        await client.follow(answer := Answer(), frames=3)
        await client.send("cancel", "b")
        await client.follow(answer)
    refused = await generate(mesh.url, **body([1] * 9000, 1))
    assert refused.done["code"] == "prompt_too_long", "a tokenizer tells"
    asked = body([7], 20, idempotency_key="k")
    assert (await generate(mesh.url_of(0), **asked)).request == (await generate(mesh.url_of(1), **asked)).request
    await mesh.until_ready()
    await mesh.drained()
    assert await mesh.bus.depths([mesh.bus.names.dead]) == [0]
    many = await asyncio.gather(*(generate(mesh.url_of(user % 2), **body([user], 30)) for user in range(20)))
    for user, each in enumerate(many):
        check(each, [user], 30)


async def test_a_streamer_keeps_prompt_schemas(mesh: RunningMesh) -> None:
    made = {"name": "short", "modules": [{"name": "a", "text": "Say"}]}
    assert (await mesh.post("/v1/prompt_schemas", made))[0] == 201
    use = {"name": "short", "modules": ["a"], "mode": "exact"}
    assert (await mesh.post("/v1/completions", {"prompt": " it.", "max_tokens": 1, "prompt_schema": use}))[0] == 200
