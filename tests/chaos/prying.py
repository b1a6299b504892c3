"""Two tenants: one puts its secret into whatever takes text, the other asks for all that is not its own."""

import asyncio
import contextlib
import json
import signal
from typing import Any

from aiohttp import ClientError, ClientSession, ClientWebSocketResponse, WSMsgType

from services.streamer.once import HEADER
from tests.chaos.field import Field
from tests.chaos.oracles import foreign, headers, secret
from tests.mesh.test_chain import body

ALICE, BOB = "alice", "bob"


class Hurt(Exception):
    """A process has just died: nothing was told."""


async def pry(field: Field) -> None:
    """While a streamer and an engine die under both."""
    hurting = asyncio.create_task(_hurt(field))
    async with ClientSession(headers=headers(ALICE)) as alice, ClientSession(headers=headers(BOB)) as bob:
        pried = 0
        for at in range(12):
            with contextlib.suppress(ClientError, Hurt):
                await _once(field, alice, bob, at)
                pried += 1
            await field.mesh.until_ready()
    await hurting
    assert pried >= 8, pried


async def _once(field: Field, alice: ClientSession, bob: ClientSession, at: int) -> None:
    mine = secret(ALICE, 100 + at)
    request = await _confide(field, alice, mine)
    said = [await _ask_after(field, bob, request, number) for number in range(2)]
    said += [await _http(bob, field.mesh.url_of(at % 2), *each) for each in _attempts(mine)]
    for text in said:
        assert not foreign(text, BOB), text


async def _hurt(field: Field) -> None:
    await asyncio.sleep(field.rng.uniform(0.5, 2.0))
    for stage in ("streamer", "engine"):
        field.kill(field.any(stage), signal.SIGKILL)


async def _confide(field: Field, alice: ClientSession, mine: str) -> str:
    """Her requests, right and wrong, hold her secret wherever text may be. Returns the name of one that is under way."""
    url = field.mesh.url_of(0)
    chat = {"messages": [{"role": "user", "content": mine, "name": mine}], "user": mine, "stop": [mine], "max_tokens": 5}
    for wrong in ({}, {mine: 1}, {"model": mine}, {"temperature": mine}, {"logit_bias": {mine: 1}}, {"metadata": {"k": mine}}):
        await _http(alice, url, "POST", "/v1/chat/completions", chat | wrong, mine)
    made = {"name": f"plan-{field.rng.random()}", "modules": [{"name": "a", "text": f"Say {mine}."}]}
    await _http(alice, url, "POST", "/v1/prompt_schemas", made, mine)
    async with alice.ws_connect(f"{url}/v1/ws") as ws:
        await ws.send_json({"type": "generate", "id": mine, **body([5], 300), "stop": mine, "idempotency_key": f"{mine}-ws"})
        said = json.loads(await _frame(ws))
        if said["type"] == "error":
            raise Hurt(said["code"])
        return str(said["request"])


async def _frame(ws: ClientWebSocketResponse) -> str:
    message = await ws.receive(timeout=20)
    if message.type is not WSMsgType.TEXT:
        raise Hurt("closed")
    return str(message.data)


async def _ask_after(field: Field, bob: ClientSession, request: str, streamer: int) -> str:
    """He resumes and cancels what is hers, by its name."""
    said = ""
    async with bob.ws_connect(f"{field.mesh.url_of(streamer)}/v1/ws") as ws:
        for frame in ({"type": "resume", "id": "r", "request": request}, {"type": "cancel", "id": request}):
            await ws.send_json(frame)
            told = await _frame(ws)
            assert json.loads(told)["type"] == "error", told
            said += told
    return said


def _attempts(mine: str) -> list[tuple[str, str, Any, str]]:
    """Her idempotency key with another question is no error of his, and tells nothing of hers."""
    asked = body([6], 3)
    wanted = [("GET", path) for path in ("/v1/prompt_schemas", "/v1/mesh", "/metrics", "/v1/models", "/v1/nothing")]
    return [("POST", "/v1/completions", asked, mine), *((how, path, None, "") for how, path in wanted)]


async def _http(http: ClientSession, url: str, how: str, path: str, asked: Any, key: str) -> str:
    async with http.request(how, f"{url}{path}", json=asked, headers={HEADER: key} if key else {}) as response:
        return f"{dict(response.headers)} {await response.text()}"
