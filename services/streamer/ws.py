"""The WebSocket protocol /v1/ws (README, "WebSocket"): several requests at once on one socket, resumable by cursor."""

import asyncio
from typing import Any

import orjson
from aiohttp import WSMsgType, web

from services.streamer.admission import Overloaded
from services.streamer.body import BadRequest
from services.streamer.door import Door
from services.streamer.errors import send_within
from services.streamer.gate import KEY, SUBPROTOCOL
from services.streamer.schema import CancelFrame, Generate, GeneratePrompt, ResumeFrame, parse_frame
from services.streamer.session import Session, StreamError
from shared import trace
from shared.connection import BusDown

MAX_IN_FLIGHT = 64  # requests at once on one socket
HEARTBEAT_S = 25.0
WRITE_BUFFER_BYTES = 32 << 10


class Socket:
    """One client's connection. Frames are sent by one task per request, each send within a deadline."""

    def __init__(self, door: Door, request: web.Request, ws: web.WebSocketResponse) -> None:
        self.door, self.request, self.ws = door, request, ws
        self.key = request[KEY]
        self.serving: dict[str, tuple[Session, asyncio.Task[None]]] = {}
        self.sending = asyncio.Lock()

    async def send(self, type: str, id: str | None, **fields: Any) -> None:
        frame = orjson.dumps({"type": type, "id": id, **fields})
        async with self.sending:
            await send_within(self.request, self.ws.send_frame(frame, WSMsgType.TEXT))

    async def error(self, id: str | None, code: str, message: str) -> None:
        await self.send("error", id, code=code, message=message)

    async def serve(self) -> None:
        """Read frames until the client leaves; what is unfinished then waits for a resume."""
        try:
            async for message in self.ws:
                if message.type is WSMsgType.TEXT:
                    await self._frame(message.data)
                elif message.type is WSMsgType.BINARY:
                    await self.error(None, "bad_frame", "frames are JSON text")
        except ConnectionResetError:
            pass  # the client is gone, or does not read
        finally:
            for session, task in self.serving.values():
                task.cancel()
                self.door.streamer.detach(session)

    async def _frame(self, raw: str) -> None:
        try:
            frame = parse_frame(raw)
        except BadRequest as error:
            await self.error(_id_of(raw), error.code, str(error))
            return
        if isinstance(frame, CancelFrame):
            await self._cancel(frame)
        elif frame.id in self.serving:
            await self.error(frame.id, "duplicate_id", "this id is in use on this socket")
        elif len(self.serving) >= MAX_IN_FLIGHT:
            await self.error(frame.id, "overloaded", f"{MAX_IN_FLIGHT} requests are open on this socket already")
        else:
            await self._begin(frame)

    async def _begin(self, frame: Generate | GeneratePrompt | ResumeFrame) -> None:
        try:
            if isinstance(frame, ResumeFrame):
                session = await self.door.resume(frame.request, frame.cursor, self.key)
            else:
                session = await self.door.open(frame, self.key, frame.idempotency_key)
        except BadRequest as error:
            await self.error(frame.id, error.code, str(error))
        except Overloaded as error:
            await self.error(frame.id, "overloaded", error.message)
        except StreamError as error:
            await self.error(frame.id, error.code, str(error))
        except ValueError as error:
            await self.error(frame.id, "bad_cursor", str(error))
        except BusDown:
            await self.error(frame.id, "no_broker", "the mesh's broker cannot be reached")
        else:
            task = asyncio.create_task(self._stream(frame.id, session, frame.return_token_ids))
            self.serving[frame.id] = (session, task)

    async def _stream(self, id: str, session: Session, with_ids: bool) -> None:
        """One request from `accepted` to its one terminal frame."""
        try:
            await self.send("accepted", id, request=session.id)
            async for deltas in session.deltas():
                for delta, cursor in session.frames(deltas):
                    if delta.finish == "stop":
                        self.door.streamer.cancel_choice(session, delta.choice)
                    told = session.follower.choices[delta.choice].ids[delta.first : delta.count]
                    extras = {"token_ids": list(told)} if with_ids else {}
                    if delta.text or extras:
                        with trace.span("streamer", "write", session.id):
                            await self.send("token", id, choice=delta.choice, text=delta.text, cursor=cursor, **extras)
            await self._done(id, session)
        except StreamError as error:
            await self.error(id, error.code, str(error))
        except ConnectionResetError:
            return  # `serve` ends too, and lets go of the session
        self.door.streamer.close(session)
        self.serving.pop(id, None)

    async def _done(self, id: str, session: Session) -> None:
        self.door.streamer.observe(session)
        await self.send(
            "done",
            id,
            finish_reasons=[output.finish or "cancelled" for output in session.outputs],
            usage=session.usage(),
            timings=session.timings(),
            cursor=session.cursor(),
        )

    async def _cancel(self, frame: CancelFrame) -> None:
        """The client's own stop: what was told so far is the answer, and `done` says so."""
        if frame.id not in self.serving:
            await self.error(frame.id, "unknown_id", "no such request is open on this socket")
        else:
            self.serving[frame.id][0].stop()


def _id_of(raw: str) -> str | None:
    """The id of a frame that is wrong elsewhere, so that its client can tell which one."""
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    id = fields.get("id") if isinstance(fields, dict) else None
    return id if isinstance(id, str) else None


def handler(door: Door) -> Any:
    async def connect(request: web.Request) -> web.WebSocketResponse:
        # No per-message deflate: 14 KiB a connection instead of 105, and no decompression bombs.
        limit = door.streamer.config.max_body_bytes
        if len(door.sockets) >= door.streamer.config.max_sockets:
            raise Overloaded(f"{door.streamer.config.max_sockets} sockets are open here already", 503, 1)
        ws = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, compress=False, max_msg_size=limit, writer_limit=WRITE_BUFFER_BYTES, protocols=(SUBPROTOCOL,)
        )
        await ws.prepare(request)
        socket = Socket(door, request, ws)
        door.sockets.add(ws)
        try:
            await socket.serve()
        finally:
            door.sockets.discard(ws)
        return ws

    return connect
