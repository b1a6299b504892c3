"""A small but real HTTP server that speaks the streaming API with known delays and faults."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Behaviour:
    """What the server does. `statuses` are given to the first requests in turn; None streams an answer."""

    first: float = 0.05  # s to the first token
    gap: float = 0.01  # s between tokens
    statuses: list[int | None] = field(default_factory=list)
    per_chunk: int = 1  # tokens in a chunk
    usage: bool = True
    endings: list[str] = field(default_factory=list)  # of the first answers: whole, cut, error, malformed, abort, hang
    api_key: str | None = None


@dataclass
class Server:
    """The running server: where it is, and what it was asked, with the moment of each request."""

    url: str
    behaviour: Behaviour
    asked: list[dict[str, Any]]
    moments: list[float]
    connections: set[Any] = field(default_factory=set)  # by which questions came: the client's address and port
    enough: asyncio.Event = field(default_factory=asyncio.Event)  # six requests have come


class SseServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self._app = web.Application()
        self._app.router.add_post("/v1/completions", self._answer)
        self._app.router.add_post("/v1/chat/completions", self._answer)
        self._app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(self._app, shutdown_timeout=0.1)
        self._seen = Server("", behaviour, [], [])

    async def __aenter__(self) -> Server:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        self._seen.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self._seen

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "small", "object": "model"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._seen.moments.append(asyncio.get_running_loop().time())
        self._seen.asked.append(body)
        if request.transport is not None:
            self._seen.connections.add(request.transport.get_extra_info("peername"))
        if len(self._seen.asked) >= 6:
            self._seen.enough.set()
        do = self._seen.behaviour
        if do.api_key and request.headers.get("Authorization") != f"Bearer {do.api_key}":
            return web.json_response({"error": {"message": "who are you?"}}, status=401)
        status = do.statuses.pop(0) if do.statuses else None
        if status is not None:
            return web.json_response({"error": {"message": "not now"}}, status=status)
        return await self._stream(request, body, do)

    async def _stream(self, request: web.Request, body: dict[str, Any], do: Behaviour) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "messages" in body
        if chat:
            await response.write(event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}))
        total = body["max_tokens"]
        ending = do.endings.pop(0) if do.endings else "whole"
        for at in range(0, total, do.per_chunk):
            await asyncio.sleep(do.gap if at else do.first)
            text = {"delta": {"content": "la "}} if chat else {"text": "la "}
            await response.write(event({"choices": [{**text, "finish_reason": None}]}))
            if ending == "abort" and request.transport is not None:
                request.transport.abort()
                return response
            if ending == "hang":
                await asyncio.sleep(60)
        await self._end(response, body, ending, chat)
        return response

    async def _end(self, response: web.StreamResponse, body: dict[str, Any], ending: str, chat: bool) -> None:
        if ending == "malformed":
            await response.write(b"data: {oops\n\n")
        elif ending == "error":
            await response.write(event({"error": {"message": "stream_lost", "code": 500}}))
        elif ending == "whole":
            last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            await response.write(event({"choices": [{**last, "finish_reason": "length"}]}))
            if self._seen.behaviour.usage:
                usage = {"prompt_tokens": len(body.get("prompt", "")), "completion_tokens": body["max_tokens"]}
                await response.write(event({"choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()


def event(fields: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()
