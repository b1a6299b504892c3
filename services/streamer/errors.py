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
    """Send, or drop the connection where the client takes nothing for SEND_S. Raises ConnectionResetError."""
    transport = request.transport
    # The sending is ended by the connection's end, never by a cancellation: aiohttp lets all that wait for a client to read
    # share one future. And a timer costs half of what an `asyncio.timeout` does, which counts: every frame has one.
    drop = None if transport is None else asyncio.get_running_loop().call_later(SEND_S, transport.abort)
    try:
        await sending
    finally:
        if drop is not None:
            drop.cancel()
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client is gone, or does not read")
