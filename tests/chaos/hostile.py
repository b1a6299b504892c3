"""Clients that mean no good, or have a bad line."""

import asyncio
import contextlib
import signal
import socket
import time

from aiohttp import ClientError, ClientSession, WSMsgType

from tests.chain import expected
from tests.chaos.field import Field
from tests.mesh.client import Answer, Client
from tests.mesh.test_chain import body
from tests.mesh.test_once import Told, ask


async def half_open(field: Field) -> None:
    """A socket that nobody reads any more stays open while its client goes on elsewhere."""
    async with ClientSession() as http:
        for at in range(8):
            prompt, answer = [500 + at, 7], Answer()
            old = await http.ws_connect(f"{field.mesh.url_of(at % 2)}/v1/ws")
            await old.send_json({"type": "generate", "id": "a", **body(prompt, 300)})
            for _ in range(field.rng.randrange(2, 20)):
                answer.take((await old.receive(timeout=20)).json())
            async with Client(field.mesh.url_of((at + 1) % 2)) as second:
                await second.send("resume", "b", request=answer.request, cursor=answer.cursor, return_token_ids=True)
                await second.follow(answer)
            assert answer.ids[0] == expected(prompt, 300), answer.terminals


async def slow_reader(field: Field) -> None:
    """It asks for much and reads nothing: it is dropped by deadline, and what it missed is there for a resume."""
    prompt = [600, 601]
    loop, field_port = asyncio.get_running_loop(), field.mesh.ports[0]
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await loop.sock_connect(raw, ("127.0.0.1", field_port))
    head = f"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1:{field_port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    await loop.sock_sendall(raw, head.encode())
    await loop.sock_recv(raw, 300)
    async with ClientSession() as http, http.ws_connect(f"{field.mesh.url}/v1/ws") as ws:
        await ws.send_json({"type": "generate", "id": "a", **body(prompt, 2000)})
        request = (await ws.receive_json(timeout=20))["request"]
    frame = f'{{"type":"resume","id":"a","request":"{request}","return_token_ids":true}}'.encode()
    await loop.sock_sendall(raw, b"\x81\xfe" + len(frame).to_bytes(2, "big") + b"\0\0\0\0" + frame)
    await asyncio.sleep(12)
    raw.close()
    answer = Answer()
    async with Client(field.mesh.url_of(1)) as client:
        await client.send("resume", "b", request=request, return_token_ids=True)
        await client.follow(answer)
    assert answer.ids[0] == expected(prompt, 2000), answer.terminals


async def leave_in_every_phase(field: Field) -> None:
    """By HTTP, where leaving is cancelling: after the head, in the queue, in the prefill, while tokens come."""
    async with ClientSession() as http:
        for _ in range(60):
            with contextlib.suppress(TimeoutError, ClientError):
                async with asyncio.timeout(field.rng.choice((0.001, 0.005, 0.02, 0.05, 0.2))):
                    async with http.post(f"{field.mesh.url}/v1/completions", json=body([700] * 900, 2000)) as response:
                        await response.read()


async def storm_of_resumes(field: Field) -> None:
    """A hundred at once on one request, from any cursor: the newest is served, the others are told."""
    prompt, tokens = [800, 801], 120
    cursors = [""]
    async with Client(field.mesh.url) as client:
        await client.send("generate", "a", **body(prompt, tokens))
        answer = Answer()
        while not answer.terminals:
            answer.take(await client.frame())
            cursors.append(answer.cursor)
    wrong = ["3.00000000", "9999.12345678", "x", "1-1.00000000"]

    async def one(at: int) -> None:
        cursor = field.rng.choice(cursors + wrong)
        async with ClientSession() as http, http.ws_connect(f"{field.mesh.url_of(at % 2)}/v1/ws") as ws:
            await ws.send_json(
                {"type": "resume", "id": "r", "request": answer.request, "cursor": cursor, "return_token_ids": True}
            )
            got = Answer()
            while not got.terminals:
                message = await ws.receive(timeout=30)
                assert message.type is WSMsgType.TEXT, message
                got.take(message.json())
        if cursor in wrong:
            assert got.done["code"] in ("stream_lost", "bad_cursor"), got.done
        elif got.done["type"] == "done":
            skipped = int(cursor.partition(".")[0] or 0)
            assert got.ids.get(0, []) == expected(prompt, tokens)[skipped:]
        else:
            assert got.done["code"] in ("superseded", "stream_lost"), got.done
            assert got.done["code"] == "superseded", "the log holds it all"

    await asyncio.gather(*(one(at) for at in range(100)))


async def asked_again(field: Field) -> None:
    """Under one idempotency key, at once and again, on both streamers, while a streamer and an engine die."""

    async def one(at: int) -> None:
        prompt, key = [900 + at, 7], f"{field.rng.random()}"
        asked, told = body(prompt, 150), list[Told]()
        while not any(each.over for each in told):
            leaving = [field.rng.choice((None, None, field.rng.randrange(1, 100))) for _ in range(2)]
            tries = (ask(field.mesh.url_of(to), key, asked, tokens) for to, tokens in enumerate(leaving))
            told += [each for each in await asyncio.gather(*tries, return_exceptions=True) if isinstance(each, Told)]
            await asyncio.sleep(0.05)
        whole = expected(prompt, 150)
        assert all(each.ids == whole[: len(each.ids)] for each in told), "a wrong token"
        assert all(each.ids == whole for each in told if each.over)
        assert len({each.request for each in told if each.request}) == 1, "it was computed twice"
        assert {each.error for each in told} <= {"", "superseded", "overloaded"}, [each.error for each in told]

    running = asyncio.gather(*(one(at) for at in range(12)))
    await asyncio.sleep(field.rng.uniform(0.1, 0.5))
    field.kill(field.any("streamer"), signal.SIGKILL)
    field.kill(field.any("engine"), signal.SIGKILL)
    await running


async def churn(field: Field) -> None:
    """Sockets that come and go, sockets that never say a word."""
    silent = [socket.create_connection(("127.0.0.1", field.mesh.ports[at % 2])) for at in range(200)]
    started = time.monotonic()
    async with ClientSession() as http:
        while time.monotonic() < started + 3:
            ws = await http.ws_connect(f"{field.mesh.url_of(field.rng.randrange(2))}/v1/ws")
            await ws.close()
    for each in silent:
        each.close()
