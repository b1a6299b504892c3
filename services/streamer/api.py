"""OpenAI's HTTP API: chat completions, completions, models. Answers whole or as server-sent events."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from services.streamer.admission import Overloaded
from services.streamer.body import BadRequest, parse_body
from services.streamer.door import Door
from services.streamer.errors import error_body, http_error, send_within
from services.streamer.gate import KEY
from services.streamer.once import HEADER
from services.streamer.schema import ChatBody, CompletionBody, Generation
from services.streamer.session import Delta, Session, StreamError
from services.streamer.shapes import CHAT, COMPLETION, Shape
from shared import trace
from shared.connection import BusDown

BODY_S = 30.0
STATUS = {"prompt_too_long": 400, "bad_prompt": 400, "superseded": 409, "deadline_exceeded": 504}
PING_S = 15.0  # an SSE comment this often, so that proxies keep the connection open during a long prefill
SSE_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    def __init__(self, door: Door) -> None:
        self.door = door
        self.started = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/chat/completions", self._handler(ChatBody, CHAT)),
            web.post("/v1/completions", self._handler(CompletionBody, COMPLETION)),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
        ]

    def _handler(self, cls: type[Generation], shape: Shape) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = parse_body(cls, await read_body(request))
            if body.stream_options is not None and not body.stream:
                raise BadRequest("stream_options needs stream: true", "stream_options")
            again = request.headers.get(HEADER)
            session = await self.door.open(body, request[KEY], again)
            try:
                return (
                    await self._stream(request, body, shape, session)
                    if body.stream
                    else await self._whole(body, shape, session)
                )
            finally:
                if again is None or session.complete:
                    self.door.streamer.close(session)
                else:
                    self.door.streamer.detach(session)

        return handle

    # -- the two forms of an answer --------------------------------------------------------------------------------

    async def _whole(self, body: Generation, shape: Shape, session: Session) -> web.Response:
        texts = ["" for _ in session.outputs]
        async for deltas in self._deltas(session):
            for delta in deltas:
                texts[delta.choice] += delta.text
        return web.json_response(body=orjson.dumps(shape.whole(self._head(session), session, body, texts)))

    async def _stream(self, request: web.Request, body: Generation, shape: Shape, session: Session) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE_HEADERS | {"X-Request-Id": session.id})
        await response.prepare(request)
        head = self._head(session)
        for opening in shape.opening(head, session):
            await _event(request, response, opening)
        pinging = asyncio.create_task(_ping(request, response, session))
        try:
            async for deltas in self._deltas(session):
                chunks = [shape.chunk(head, session, body, delta) for delta in deltas]
                with trace.span("streamer", "write", session.id):
                    await _event(request, response, *chunks, id=session.cursor())
            if body.stream_options is not None and body.stream_options.include_usage:
                await _event(request, response, head | {"choices": [], "usage": session.usage()})
            await send_within(request, response.write(b"data: [DONE]\n\n"))
        except StreamError as error:
            await _event(request, response, error_body(str(error), "server_error", error.code))
        finally:
            pinging.cancel()
        return response

    async def _deltas(self, session: Session) -> AsyncIterator[list[Delta]]:
        streamer = self.door.streamer
        async for deltas in session.deltas():
            for delta in deltas:
                if delta.finish == "stop":
                    streamer.cancel_choice(session, delta.choice)
            yield deltas
        streamer.observe(session)

    def _head(self, session: Session) -> dict[str, Any]:
        # From the record, so that who asks again under an idempotency key is told the same.
        created = session.record.submit.deadline_ms // 1000 - self.door.streamer.config.request_timeout_s
        return {"id": f"req-{session.id}", "created": created, "model": self.door.served}

    # -- models ----------------------------------------------------------------------------------------------------

    def _model(self) -> dict[str, Any]:
        context = self.door.context
        return {
            "id": self.door.served,
            "object": "model",
            "created": self.started,
            "owned_by": "headrace",
            "max_model_len": context,
        }

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in ("default", self.door.served):
            raise BadRequest(f"the model {name!r} is not served here", "model", "model_not_found", 404)
        return web.json_response(self._model())


async def read_body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError as error:
        raise BadRequest(f"the body took longer than {BODY_S:.0f} s", None, "body_too_slow", 408) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise BadRequest("the body is larger than HEADRACE_STREAMER_MAX_BODY_BYTES", None, "body_too_large", 413) from error


async def _event(request: web.Request, response: web.StreamResponse, *items: dict[str, Any], id: str = "") -> None:
    head = f"id: {id}\n".encode() if id else b""
    await send_within(request, response.write(b"".join(head + b"data: " + orjson.dumps(item) + b"\n\n" for item in items)))


async def _ping(request: web.Request, response: web.StreamResponse, session: Session) -> None:
    """While nothing is said, a comment now and then keeps proxies from closing the connection."""
    while True:
        await asyncio.sleep(PING_S)
        if time.monotonic() - session.heard > PING_S:
            await send_within(request, response.write(b": ping\n\n"))


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Everything that can go wrong before an answer begins, in OpenAI's error form."""
    try:
        return await handler(request)
    except BadRequest as error:
        return http_error(error.status, str(error), "invalid_request_error", error.code, error.param)
    except StreamError as error:
        status = STATUS.get(error.code, 503)
        kind = "invalid_request_error" if status < 500 else "server_error"
        return http_error(status, str(error), kind, error.code)
    except Overloaded as error:
        return http_error(error.status, error.message, "overloaded", "overloaded", retry_after_s=error.retry_after_s)
    except BusDown:
        return http_error(503, "the mesh's broker cannot be reached", "server_error", "no_broker", retry_after_s=2)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return http_error(
            error.status, f"{error.reason}: {request.method} {request.path}", "invalid_request_error", "http_error"
        )
