"""Prompt schemas through the door: registered at one streamer, used at another, by one tenant and never by another."""

from typing import Any

import pytest
from aiohttp import ClientSession

from services.streamer.body import BadRequest
from services.streamer.prompt_modules import Module, Schema
from services.streamer.prompt_schemas import MAX_BYTES, MAX_SCHEMAS, Schemas
from tests.mesh.client import generate
from tests.mesh.harness import RunningMesh

PATH = "/v1/prompt_schemas"
RULES = " ".join(f"Rule {at}: name the lock, and the level of the water there." for at in range(20))
TOWN: dict[str, Any] = {
    "name": "town",
    "modules": [
        {"name": "rules", "text": RULES},
        {"name": "aim", "text": " The aim is {{what}}.", "parameters": {"what": 4}},
    ],
}
CHOICE = {"name": "town", "modules": ["rules", "aim"], "arguments": {"aim": {"what": "peace"}}, "mode": "exact"}


async def ask(mesh: RunningMesh, method: str, path: str, body: Any = None, streamer: int = 0) -> tuple[int, Any]:
    async with ClientSession() as client, client.request(method, mesh.url_of(streamer) + path, json=body) as response:
        return response.status, await response.json()


async def test_a_schema_makes_the_prompt_that_it_spells(chain_mesh: RunningMesh) -> None:
    """Token by token the answer to the same prompt written out, whichever streamer is asked, over HTTP and WebSocket."""
    assert (await ask(chain_mesh, "POST", PATH, TOWN))[0] == 201
    plain = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    spelled = f"{RULES} The aim is peace."
    status, wanted = await ask(chain_mesh, "POST", "/v1/completions", plain | {"prompt": f"{spelled} Go on."})
    short = plain | {"prompt": " Go on.", "prompt_schema": CHOICE}
    assert status == 200
    status, got = await ask(chain_mesh, "POST", "/v1/completions", short, streamer=1)
    assert status == 200
    assert got["choices"][0] == wanted["choices"][0]
    assert got["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    asked = {"role": "user", "content": "Go on."}
    long = await generate(chain_mesh.url, messages=[{"role": "system", "content": spelled}, asked], **plain)
    chat = await generate(chain_mesh.url, messages=[asked], prompt_schema=CHOICE, **plain)
    assert chat.ids == long.ids


async def test_a_module_that_stands_first_is_computed_as_it_would_be(mesh: RunningMesh) -> None:
    """With nothing before it, nothing is approximate: the real model says the same, word for word, to another question, too."""
    await ask(mesh, "POST", PATH, {"name": "one", "modules": [{"name": "rules", "text": RULES}]})
    for question in (" The first lock is", " The last lock was"):
        told = []
        for mode in ("exact", "modules"):
            use = {"name": "one", "modules": ["rules"], "mode": mode}
            body = {"prompt": question, "max_tokens": 12, "temperature": 0, "prompt_schema": use}
            status, reply = await ask(mesh, "POST", "/v1/completions", body)
            assert status == 200, reply
            told.append(reply)
        assert told[0]["choices"] == told[1]["choices"]
    assert told[1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 300


async def test_looked_at_and_deleted(chain_mesh: RunningMesh) -> None:
    await ask(chain_mesh, "POST", PATH, TOWN | {"name": "gone"})
    shown = {"object": "prompt_schema"} | TOWN | {"name": "gone"}
    assert await ask(chain_mesh, "GET", f"{PATH}/gone", streamer=1) == (200, shown)
    assert shown in (await ask(chain_mesh, "GET", PATH))[1]["data"]
    assert (await ask(chain_mesh, "DELETE", f"{PATH}/gone", streamer=1))[0] == 200
    for method in ("GET", "DELETE"):
        status, reply = await ask(chain_mesh, method, f"{PATH}/gone")
        assert (status, reply["error"]["code"]) == (404, "schema_not_found")


WRONG = [
    ({"name": "nowhere"}, 404, "prompt_schema.name"),
    ({"modules": ["moon"]}, 400, "prompt_schema.modules"),
    ({"arguments": {"aim": {"what": "a long word " * 9}}}, 400, "prompt_schema.arguments.aim.what"),
    ({"mode": "fast"}, 400, "prompt_schema.mode"),
    ({"mode": "modules", "modules": ["moon"]}, 400, "prompt_schema.modules"),
]


@pytest.mark.parametrize(("change", "status", "param"), WRONG, ids=[param for _, _, param in WRONG])
async def test_a_bad_use_is_refused(chain_mesh: RunningMesh, change: dict[str, Any], status: int, param: str) -> None:
    await ask(chain_mesh, "POST", PATH, TOWN)
    body = {"prompt": "x", "max_tokens": 1, "prompt_schema": CHOICE | change}
    got, reply = await ask(chain_mesh, "POST", "/v1/completions", body)
    assert (got, reply["error"]["param"]) == (status, param)


async def test_a_tenants_own_and_bounded(chain_mesh: RunningMesh) -> None:
    schemas = Schemas(chain_mesh.bus)
    small = Schema(name="small", modules=[Module(name="a", text="x")])
    await schemas.put("alice", small)
    assert await schemas.find("alice", "small") == small
    with pytest.raises(BadRequest, match="no prompt schema"):
        await schemas.find("bob", "small")
    with pytest.raises(BadRequest, match="has room for"):
        await schemas.put("alice", Schema(name="large", modules=[Module(name="a", text="x" * MAX_BYTES)]))
    for at in range(MAX_SCHEMAS - 1):
        await schemas.put("alice", Schema(name=f"s{at}", modules=small.modules))
    with pytest.raises(BadRequest, match="has room for"):
        await schemas.put("alice", Schema(name="more", modules=small.modules))
    await schemas.put("alice", small)
    assert len(await schemas.all("alice")) == MAX_SCHEMAS
    assert not await schemas.all("bob")
