"""Modules computed apart, on engines that share a cache: fetched wherever they stand, by their own tenant, and never wrong."""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from services.engine.parts import pack
from shared.config import bundled_model
from shared.layout import Layout, Placement, Segment
from shared.vocab import load_vocab
from tests.chain import expected
from tests.mesh.client import Answer, Client
from tests.prefix_cache.meshes import EngineMesh
from tests.prefix_cache.test_engines import counted, stored
from tests.prefix_cache.test_tenants import found, settled

TEXTS = {name: " ".join(f"{name} {at}: name the lock and the level there." for at in range(12)) for name in "ABC"}
ROOM = 200  # positions for each
OUTPUT = 160  # 3 s at least


@pytest.fixture(scope="module")
async def mesh() -> AsyncIterator[EngineMesh]:
    async with EngineMesh(2) as running:
        yield running


def ids(text: str) -> list[int]:
    return list(load_vocab(bundled_model()).tokenizer.encode(text, add_special_tokens=False).ids)


def layout(names: str) -> Layout:
    parts: list[tuple[Segment, ...]] = [((ROOM * (ord(name) - ord("A")), TEXTS[name]),) for name in names]
    return Layout(mark="*", parts=tuple(parts), arguments=(), end=3 * ROOM)


async def test_only_the_tenant_finds_its_modules(mesh: EngineMesh) -> None:
    """Wherever a module stands among the others; whoever lacks one computes that one."""
    lengths = {name: len(ids(text)) for name, text in TEXTS.items()}
    first, _ = await found(mesh, "alice", "*First?", layout("AB"))
    await settled(mesh)
    await mesh.forget("engine-1")
    other, _ = await found(mesh, "bob", "*Then?", layout("AB"))
    own, _ = await found(mesh, "alice", "*Then?", layout("BC"))
    assert (first, other, own) == (0, 0, lengths["B"])
    assert await counted(mesh, "prefix_fetched_tokens") >= lengths["B"] // 16 * 16
    assert await counted(mesh, "prefix_spoiled") == 0


async def test_the_real_model_goes_on_with_fetched_modules() -> None:
    """At float32, word for word: a new engine takes from the cache what the old one computed, and computes what it lacks."""
    async with EngineMesh(1, size_mb=256, chain=False, env={"HEADRACE_DTYPE": "float32"}) as mesh:
        modules = [{"name": name, "text": text} for name, text in TEXTS.items()]
        assert (await mesh.post("/v1/prompt_schemas", {"name": "s", "modules": modules}))[0] == 201

        async def ask(names: str) -> tuple[str, int]:
            user = [{"role": "user", "content": "Where is the lock?"}]
            body = {
                "messages": user,
                "max_tokens": 16,
                "temperature": 0,
                "prompt_schema": {"name": "s", "modules": list(names)},
            }
            status, reply = await mesh.post("/v1/chat/completions", body)
            assert status == 200, reply
            cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            return reply["choices"][0]["message"]["content"], cached

        choices = ("AB", "BC", "CA")
        told = {names: (await ask(names))[0] for names in choices}
        await stored(mesh, sum(len(ids(text)) // 16 for text in TEXTS.values()))
        await mesh.forget()
        for names in choices:
            text, cached = await ask(names)
            assert text == told[names]
            assert cached >= sum(len(ids(TEXTS[name])) for name in names)
        assert await counted(mesh, "prefix_fetched_tokens") >= sum(len(ids(text)) // 16 * 16 for text in TEXTS.values())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_an_engine_goes_between_modules_and_answer(mesh: EngineMesh, how: signal.Signals) -> None:
    """The next one puts the same prompt together and goes on: every token depends on all that the pages hold."""
    await mesh.until_ready()
    modules = [{"name": name, "text": text} for name, text in TEXTS.items()]
    modules.append({"name": "D", "text": "Go for {{days}} days.", "parameters": {"days": 3}})
    status, _ = await mesh.post("/v1/prompt_schemas", {"name": "s", "modules": modules})
    assert status == 201
    use = {"name": "s", "modules": ["A", "C", "D"], "arguments": {"D": {"days": "two"}}}
    parts = [[TEXTS["A"]], [TEXTS["C"]], ["Go for ", " days."]]
    pieces = [[ids(text) for text in part] for part in parts]
    rest = [ids("two"), ids(" Where to?")]
    tokens = [id for part in (*pieces, rest) for piece in part for id in piece]
    runs = tuple(tuple((0, len(piece)) for piece in part) for part in (*pieces, rest))
    packed = pack(tokens, Placement(head=0, parts=runs[:-1], rest=runs[-1]), b"", 16)

    body = {"prompt": " Where to?", "prompt_schema": use, "n": 2, "max_tokens": OUTPUT}
    async with asyncio.timeout(60), Client(mesh.url) as client:
        await client.send("generate", "a", ignore_eos=True, return_token_ids=True, **body)
        await asyncio.sleep(1.2)  # a heartbeat
        engines = [beat for beat in await mesh.bus.members() if beat.stage == "engine"]
        [busy] = [beat for beat in engines if beat.gauges.get("running")]
        [other] = [beat for beat in engines if beat is not busy]
        mesh.kill(busy.id, how)
        answer = await client.follow(Answer())
    for choice in range(2):
        assert answer.ids[choice] == expected(packed.tokens, OUTPUT, choice)
    assert answer.done["usage"]["prompt_tokens"] == len(tokens)
    await asyncio.sleep(1.2)
    [now] = [beat for beat in await mesh.bus.members() if beat.id == other.id]
    assert now.counters["takeovers"] == other.counters.get("takeovers", 0) + 1
