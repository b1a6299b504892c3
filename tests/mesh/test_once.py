"""Idempotency keys: whoever asks again gets the same request, from its start, on any streamer; nothing is computed twice."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession

from services.streamer.keys import LOCAL, digest
from services.streamer.once import HEADER, MAX_KEYS
from tests.chain import expected
from tests.mesh.client import generate
from tests.mesh.harness import RunningMesh
from tests.mesh.test_chain import body

ALICE, BOB = "hr-alice", "hr-bob"
_fresh = (f"key-{number}" for number in itertools.count())


@dataclass
class Told:
    """A streamed answer as far as it came."""

    request: str = ""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    error: str = ""
    over: bool = False

    def take(self, line: bytes) -> None:
        data = line.removeprefix(b"data: ").strip()
        if not line.startswith(b"data: ") or data == b"[DONE]":
            self.over = self.over or data == b"[DONE]"
            return
        said = json.loads(data)
        if "error" in said:
            self.error = said["error"]["code"]
            return
        self.request = said["id"]
        self.ids += said["choices"][0].get("token_ids", ())
        self.text += said["choices"][0]["text"]


async def read(response: ClientResponse, tokens: int | None = None) -> Told:
    """All of it, or until so many tokens have come."""
    told = Told()
    if response.status != 200:
        told.error = (await response.json())["error"]["code"]
        return told
    async for line in response.content:
        told.take(line)
        if tokens is not None and len(told.ids) >= tokens:
            break
    return told


def stream(http: ClientSession, url: str, asked: dict[str, Any], key: str = "") -> Any:
    return http.post(f"{url}/v1/completions", json=asked | {"stream": True}, headers={HEADER: key} if key else {})


async def ask(url: str, key: str, asked: dict[str, Any], tokens: int | None = None, secret: str = "") -> Told:
    """Ask for a stream and, with `tokens`, leave in the middle of it."""
    who = {"Authorization": f"Bearer {secret}"} if secret else {}
    async with ClientSession(headers=who) as http, stream(http, url, asked, key) as response:
        return await read(response, tokens)


async def post(url: str, key: str, **asked: Any) -> tuple[int, Any]:
    async with ClientSession() as http, http.post(f"{url}/v1/completions", json=asked, headers={HEADER: key}) as response:
        return response.status, await response.json()


async def computed(mesh: RunningMesh) -> tuple[float, float]:
    """Requests that streamers have opened, and tokens that engines have said, as their heartbeats tell."""
    await asyncio.sleep(1.2)
    wanted = ("streamer", "requests"), ("engine", "output_tokens")
    beats = await mesh.bus.members()
    opened, said = (sum(b.counters.get(name, 0) for b in beats if b.stage == stage) for stage, name in wanted)
    return opened, said


async def test_at_once_on_two_streamers(chain_mesh: RunningMesh) -> None:
    before, prompt, key = await computed(chain_mesh), [31, 7], next(_fresh)
    told = await asyncio.gather(*(ask(chain_mesh.url_of(at % 2), key, body(prompt, 120)) for at in range(6)))
    served = [each for each in told if each.over]
    assert served
    assert all(each.error == "superseded" for each in told if not each.over)
    assert all(each.ids == expected(prompt, 120) for each in served)
    assert len({each.request for each in told if each.request}) == 1
    opened, tokens = await computed(chain_mesh)
    assert (opened - before[0], tokens - before[1]) == (1, 120)


async def test_after_its_end_and_in_the_other_form(chain_mesh: RunningMesh) -> None:
    before, asked, key = await computed(chain_mesh), body([32, 7], 60), next(_fresh)
    first = await post(chain_mesh.url_of(0), key, **asked)
    again = await post(chain_mesh.url_of(1), key, **asked)
    assert first == again
    assert first[1]["choices"][0]["token_ids"] == expected([32, 7], 60)
    opened, tokens = await computed(chain_mesh)
    assert (opened - before[0], tokens - before[1]) == (1, 60)
    status, answer = await post(chain_mesh.url_of(1), key, **(asked | {"max_tokens": 61}))
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (422, "idempotency_key_reused", HEADER)
    assert (await post(chain_mesh.url_of(1), next(_fresh), **(asked | {"max_tokens": 61})))[0] == 200


async def test_a_client_that_left_finds_its_answer_elsewhere(chain_mesh: RunningMesh) -> None:
    before, asked, key = await computed(chain_mesh), body([33, 7], 300), next(_fresh)
    part = await ask(chain_mesh.url_of(0), key, asked, tokens=20)
    assert not part.over
    whole = await ask(chain_mesh.url_of(1), key, asked)
    assert (whole.ids, whole.request) == (expected([33, 7], 300), part.request)
    opened, tokens = await computed(chain_mesh)
    assert (opened - before[0], tokens - before[1]) == (1, 300)
    await chain_mesh.drained()


async def test_without_a_key_leaving_cancels(chain_mesh: RunningMesh) -> None:
    """What the key changes: the same departure ends the request where there is none."""
    _, before = await computed(chain_mesh)
    async with ClientSession() as http, stream(http, chain_mesh.url, body([34], 900)) as response:
        await read(response, 5)
    await chain_mesh.drained()
    assert (await computed(chain_mesh))[1] - before < 900


async def test_an_answer_that_a_stop_string_ended(chain_mesh: RunningMesh) -> None:
    prompt, key = [35, 7], next(_fresh)
    whole = await generate(chain_mesh.url, **body(prompt, 200))
    stop = whole.texts[0][100:106]
    asked = body(prompt, 200, stop=stop)
    first = await ask(chain_mesh.url_of(0), key, asked)
    await chain_mesh.drained()
    before = await computed(chain_mesh)
    again = await ask(chain_mesh.url_of(1), key, asked)
    assert first.over
    assert (again.text, again.request, again.over) == (first.text, first.request, True)
    assert first.text == whole.texts[0][: whole.texts[0].index(stop)]
    assert await computed(chain_mesh) == before


async def test_its_streamer_dies(chain_mesh: RunningMesh) -> None:
    asked, key = body([36, 7], 400), next(_fresh)
    async with ClientSession() as http, stream(http, chain_mesh.url_of(0), asked, key) as response:
        part = await read(response, 10)
        chain_mesh.kill("streamer-0")
    whole = await ask(chain_mesh.url_of(1), key, asked)
    assert (whole.ids, whole.request) == (expected([36, 7], 400), part.request)
    await chain_mesh.until_ready()


async def test_over_the_websocket(chain_mesh: RunningMesh) -> None:
    asked = body([37, 7], 50, idempotency_key=next(_fresh))
    first, again = [await generate(chain_mesh.url_of(at), **asked) for at in range(2)]
    assert first.request == again.request
    assert first.ids[0] == again.ids[0] == expected([37, 7], 50)
    other = await generate(chain_mesh.url, **(asked | {"n": 2}))
    assert other.done["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "ü"])
async def test_what_is_no_key(chain_mesh: RunningMesh, key: str) -> None:
    assert (await generate(chain_mesh.url, **body([1], 1, idempotency_key=key))).done["code"] == "invalid_request"
    if key.isascii():
        status, answer = await post(chain_mesh.url, key, **body([1], 1))
        assert (status, answer["error"]["param"]) == (400, HEADER)


async def test_their_number_is_bounded(chain_mesh: RunningMesh) -> None:
    names, key = chain_mesh.bus.names, next(_fresh)
    assert (await post(chain_mesh.url, key, **body([38], 2)))[0] == 200
    fill = [part for number in range(MAX_KEYS) for part in (time.time() + 3, f"other-{number}")]
    await chain_mesh.bus.run([("ZADD", names.once(LOCAL, "all"), *fill)])
    status, answer = await post(chain_mesh.url, next(_fresh), **body([38], 2))
    assert (status, answer["error"]["code"]) == (429, "overloaded")
    assert (await post(chain_mesh.url, key, **body([38], 2)))[0] == 200, "it is known"
    await asyncio.sleep(3)
    assert (await post(chain_mesh.url, next(_fresh), **body([38], 2)))[0] == 200, "the others have ended"


async def test_the_broker_forgets_all(chain_mesh: RunningMesh) -> None:
    """What nobody has any more is computed again."""
    asked, key = body([39, 7], 30), next(_fresh)
    first = await post(chain_mesh.url, key, **asked)
    await chain_mesh.bus.run([("FLUSHALL",)])
    await chain_mesh.until_ready()
    again = await post(chain_mesh.url, key, **asked)
    assert again[1]["id"] != first[1]["id"]
    assert again[1]["choices"] == first[1]["choices"]


@pytest.fixture(scope="module")
async def tenants() -> AsyncIterator[RunningMesh]:
    env = {"HEADRACE_STREAMER_KEYS": f"alice {digest(ALICE)}; bob {digest(BOB)}"}
    async with RunningMesh({}, chain=True, env=env) as running:
        yield running


async def test_each_tenant_has_its_own(tenants: RunningMesh) -> None:
    asked, key = body([40, 7], 20), next(_fresh)
    alice, again = [await ask(tenants.url, key, asked, secret=ALICE) for _ in range(2)]
    bob = await ask(tenants.url, key, asked | {"max_tokens": 10}, secret=BOB)
    assert (alice.ids, alice.request) == (again.ids, again.request) == (expected([40, 7], 20), alice.request)
    assert bob.ids == expected([40, 7], 10)
    assert bob.request != alice.request
