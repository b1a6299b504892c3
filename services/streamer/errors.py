"""Errors as OpenAI writes them, and sends that cannot hang."""

import asyncio
from collections.abc import Awaitable

import orjson
from aiohttp import web

SEND_S = 10.0  # a client that takes nothing for this long is dropped; it may resume over the WebSocket


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def http_error(
    status: int, message: str, kind: str, code: str, param: str | None = None, retry_after_s: int | None = None
) -> web.Response:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    body = orjson.dumps(error_body(message, kind, code, param))
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


async def send_within(request: web.Request, sending: Awaitable[None]) -> None:
    """Send, or drop the connection. After a time-out the socket is never touched again. Raises ConnectionResetError."""
    try:
        async with asyncio.timeout(SEND_S):
            await sending
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read") from None
