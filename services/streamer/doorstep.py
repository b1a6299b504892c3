"""Connections that never say what they want: dropped, so that they cannot use up what others need."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

HEAD_S = 10.0  # from the connection to the end of its first request's head
SWEEP_S = 2.5


class Doorstep:
    def __init__(self) -> None:
        self._since: dict[web.RequestHandler, float] = {}
        self._asked: set[web.RequestHandler] = set()

    def middleware(self) -> Middleware:
        @web.middleware
        async def note(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            self._asked.add(request.protocol)
            return await handler(request)

        return note

    async def sweep(self, server: web.Server) -> None:
        """Until cancelled. Idle connections that have asked before are the keep-alive time-out's business."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now, here = loop.time(), server.connections
            self._asked.intersection_update(here)
            self._since = {each: self._since.get(each, now) for each in here if each not in self._asked}
            for connection, since in self._since.items():
                if now - since > HEAD_S and connection.transport is not None:
                    connection.transport.abort()
