"""The door with keys: who gets in, as whom, how often; WebSockets from browsers; and clients that mean no good."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, WSServerHandshakeError

from services.streamer.keys import digest
from tests.chain import expected
from tests.mesh.client import Answer
from tests.mesh.harness import RunningMesh
from tests.mesh.test_chain import body

ALICE, BOB, SLOW = "hr-alice", "hr-bob", "hr-slow"
KEYS = f"alice {digest(ALICE)}; bob {digest(BOB)} streams=2; slow {digest(SLOW)} requests=2 tokens=50"
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
async def mesh() -> AsyncIterator[RunningMesh]:
    env = {"HEADRACE_STREAMER_KEYS": KEYS, "HEADRACE_STREAMER_ORIGINS": PAGE, "CHAIN_STEP_S": "0.002"}
    async with RunningMesh({"streamer": 2}, chain=True, env=env) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def post(
    url: str, path: str = "/v1/completions", headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, Any]:
    async with ClientSession(headers=headers) as client, client.post(f"{url}{path}", json=fields or body([1], 5)) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    "headers", [{}, bearer("hr-x"), bearer(""), bearer(digest(ALICE)), {"Authorization": f"Basic {ALICE}"}]
)
async def test_no_key_no_answer(mesh: RunningMesh, headers: dict[str, str]) -> None:
    for path in ("/v1/completions", "/v1/ticket", "/v1/nothing"):
        status, answer = await post(mesh.url, path, headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    async with ClientSession(headers=headers) as client:
        for path in ("/v1/models", "/v1/mesh", "/metrics", "/v1/models/default", "//v1/models", "/page/../v1/models"):
            assert (await client.get(f"{mesh.url}{path}")).status in (401, 404), path
        assert (await client.get(f"{mesh.url}/healthz")).status == 200
        with pytest.raises(WSServerHandshakeError, match="401"):
            await client.ws_connect(f"{mesh.url}/v1/ws")


async def test_a_key_opens_and_the_answer_says_little(mesh: RunningMesh) -> None:
    async with ClientSession(headers=bearer(ALICE)) as client, client.get(f"{mesh.url}/v1/models") as response:
        assert response.status == 200
        assert "Server" not in response.headers
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    status, answer = await post(mesh.url, headers=bearer(ALICE))
    assert (status, answer["choices"][0]["token_ids"]) == (200, expected([1], 5))


async def test_another_tenants_stream_is_as_unknown_as_none(mesh: RunningMesh) -> None:
    async with ClientSession() as http:
        alice = await http.ws_connect(f"{mesh.url_of(0)}/v1/ws", headers=bearer(ALICE))
        answer = await _begin(alice, [7, 7], 400)
        bob = await http.ws_connect(f"{mesh.url_of(1)}/v1/ws", headers=bearer(BOB))
        for request in (answer.request, "0" * 32):
            await bob.send_json({"type": "resume", "id": "r", "request": request, "cursor": answer.cursor})
            frame = await bob.receive_json()
            assert (frame["code"], frame["message"]) == ("stream_lost", "this request is not known (any more)")
        while not answer.terminals:
            answer.take(await alice.receive_json())
    assert answer.ids[0] == expected([7, 7], 400)


async def _begin(ws: ClientWebSocketResponse, prompt: list[int], tokens: int, id: str = "a") -> Answer:
    answer = Answer()
    await ws.send_json({"type": "generate", "id": id, **body(prompt, tokens)})
    while not answer.frames and not answer.terminals:
        answer.take(await ws.receive_json())
    return answer


async def test_a_ticket_opens_one_socket_once(mesh: RunningMesh) -> None:
    """Issued by one streamer, used at the other; the answer names the real subprotocol only."""
    _, ticket = await post(mesh.url_of(0), "/v1/ticket", bearer(ALICE), x=1)
    async with ClientSession() as client:
        ws = await client.ws_connect(f"{mesh.url_of(1)}/v1/ws", protocols=ticket["protocols"], headers={"Origin": PAGE})
        assert ws.protocol == "headrace"
        assert (await _begin(ws, [5], 3)).ids[0][:1] == expected([5], 1)
        for protocols in (ticket["protocols"], ["headrace", "headrace.ticket.x"], ["headrace"]):
            with pytest.raises(WSServerHandshakeError, match="401"):
                await client.ws_connect(f"{mesh.url_of(1)}/v1/ws", protocols=protocols)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", f"{PAGE}.evil.example"])
async def test_pages_of_others_get_nothing(mesh: RunningMesh, origin: str) -> None:
    headers = bearer(ALICE) | {"Origin": origin}
    assert (await post(mesh.url, headers=headers))[0] == 403
    async with ClientSession(headers=headers) as client:
        with pytest.raises(WSServerHandshakeError, match="403"):
            await client.ws_connect(f"{mesh.url}/v1/ws")
    own = bearer(ALICE) | {"Origin": mesh.url}
    assert (await post(mesh.url, headers=own))[0] == 200


async def test_streams_at_once_are_counted_over_all_streamers(mesh: RunningMesh) -> None:
    async with ClientSession(headers=bearer(BOB)) as client:
        sockets = [await client.ws_connect(f"{mesh.url_of(at % 2)}/v1/ws") for at in range(3)]
        answers = [await _begin(ws, [at], 3000) for at, ws in enumerate(sockets)]
        assert [len(answer.terminals) for answer in answers] == [0, 0, 1]
        assert answers[2].done["code"] == "overloaded"
        await sockets[0].send_json({"type": "cancel", "id": "a"})
        while not answers[0].terminals:
            answers[0].take(await sockets[0].receive_json())
        await asyncio.sleep(0.1)
        assert not (await _begin(sockets[2], [9], 3)).terminals


async def test_requests_a_second_and_tokens_a_minute(mesh: RunningMesh) -> None:
    many = await asyncio.gather(*(post(mesh.url_of(at % 2), headers=bearer(SLOW)) for at in range(12)))
    statuses = [status for status, _ in many]
    assert statuses.count(429) >= 8, "two a second, and the burst may touch two seconds"
    assert statuses.count(200) + statuses.count(429) == 12
    await asyncio.sleep(1.1)
    status, first = await post(mesh.url, headers=bearer(SLOW), **body([1, 2], 60))
    if status == 200:
        await asyncio.sleep(1.1)
        status, first = await post(mesh.url, headers=bearer(SLOW))
    assert status in (200, 429)
    assert status == 200 or "tokens a minute" in first["error"]["message"]


async def test_what_no_client_should_send(mesh: RunningMesh) -> None:
    """Oversize frames, bad UTF-8, reserved bits, floods of pings: refused with a code, or borne; others go on."""
    async with ClientSession(headers=bearer(ALICE)) as client:
        good = await client.ws_connect(f"{mesh.url}/v1/ws")
        answer = await _begin(good, [4, 2], 500)
        pings = await client.ws_connect(f"{mesh.url}/v1/ws", autoping=False)
        for _ in range(1000):
            await pings.ping()
        assert (await pings.receive(timeout=5)).type is WSMsgType.PONG
        big = b"\x81\xff" + ((1 << 20) + 1).to_bytes(8) + b"\0\0\0\0x"  # the size is refused before the rest has come
        noise, reserved, unknown = b"\x81\x82\0\0\0\0\xff\xfe", b"\xc1\x81\0\0\0\0x", b"\x83\x81\0\0\0\0x"
        for frame, code in ((big, 1009), (noise, 1007), (reserved, 1002), (unknown, 1002)):
            assert await asyncio.to_thread(_raw, mesh.ports[0], frame) == code
        while not answer.terminals:
            answer.take(await good.receive_json())
    assert answer.ids[0] == expected([4, 2], 500)


def _raw(port: int, frame: bytes) -> int:
    """The close code that a hand-made frame is answered by."""
    head = f"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {ALICE}\r\nUpgrade: websocket\r\n"
    head += "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(head.encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += raw.recv(4096)
        raw.sendall(frame)
        closing = answer.partition(b"\r\n\r\n")[2]
        while len(closing) < 4:
            closing += raw.recv(4096)
    return int.from_bytes(closing[2:4])


async def test_a_connection_that_says_nothing_is_dropped(mesh: RunningMesh) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", mesh.ports[0])
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        async with asyncio.timeout(20):
            while True:
                await reader.readexactly(1)
    writer.close()
