"""One engine's connection: frames in, answers out, and pages as raw bytes for an engine of another host."""

import asyncio
import logging
import socket

from services.prefix_cache.leases import Holder
from services.prefix_cache.shelf import Full, Shelf
from shared.codec import Malformed, decode_talk, frame, frame_length
from shared.prefix import (
    FRAME_HEAD_BYTES,
    Commit,
    Find,
    Hello,
    Refusal,
    Release,
    Reserve,
    Send,
    Spoiled,
    Store,
    Talk,
    Welcome,
)
from shared.wire import Wire

HELLO_S = 5.0
MAX_CONVERSATIONS = 256
STALL_S = 5.0  # an engine that takes nothing for this long is cut off
CHUNK = 1 << 20
AHEAD = 4 << 20  # bytes of pages that wait between here and the network, for one engine
log = logging.getLogger("headrace")


class Conversation:
    def __init__(self, shelf: Shelf, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._shelf, self._reader, self._writer = shelf, reader, writer
        self._space = b""
        self._holder = Holder()

    def abort(self) -> None:
        self._writer.transport.abort()

    async def run(self) -> None:
        """Until the engine leaves, misbehaves or stalls; whatever it held is then free."""
        self._shelf.open.add(self)
        try:
            await self._greet()
            while True:
                await self._answer(await self._hear())
        except (Malformed, Full) as error:
            self._shelf.stats.counters["refused_engines"] += 1
            log.warning("an engine was refused: %s", error)
            self._writer.write(frame(Refusal(why=str(error))))
        except (OSError, EOFError, TimeoutError):
            pass
        finally:
            self._shelf.leases.leave(self._holder)
            self._shelf.open.discard(self)
            self._writer.close()

    async def _hear(self) -> Talk:
        length = frame_length(await self._reader.readexactly(FRAME_HEAD_BYTES))
        return decode_talk(await self._reader.readexactly(length))

    async def _greet(self) -> None:
        if len(self._shelf.open) > MAX_CONVERSATIONS:
            raise Full(f"{MAX_CONVERSATIONS} connections already")
        async with asyncio.timeout(HELLO_S):
            hello = await self._hear()
        if not isinstance(hello, Hello):
            raise Malformed(f"{hello.kind} before hello")
        self._space, self._holder = hello.space, self._shelf.enter(hello.page_bytes)
        self._welcome(Welcome(slot_bytes=self._shelf.slot_bytes, slots=self._shelf.index.slots))

    def _welcome(self, item: Welcome) -> None:
        """Over a Unix socket the arena's descriptor rides on the message."""
        ours = self._writer.get_extra_info("socket")
        if ours.family != socket.AF_UNIX:
            self._writer.transport.set_write_buffer_limits(AHEAD)
            self._writer.write(frame(item))
            return
        with socket.fromfd(ours.fileno(), ours.family, ours.type) as own:
            socket.send_fds(own, [frame(item)], [self._shelf.arena.fd])

    async def _answer(self, item: Talk) -> None:
        shelf, holder = self._shelf, self._holder
        match item:
            case Find():
                await self._say(shelf.find(holder, self._space, item))
            case Reserve():
                await self._say(shelf.reserve(holder, self._space, item))
            case Commit():
                await self._say(shelf.commit(holder, item))
            case Release():
                shelf.release(holder, item)
            case Spoiled():
                shelf.spoiled(self._space, item)
            case Send():
                await self._send(item)
            case Store():
                await self._store(item)
            case _:
                raise Malformed(f"an engine does not say {item.kind}")

    async def _say(self, item: Wire) -> None:
        self._writer.write(frame(item))
        await self._sent()

    async def _sent(self) -> None:
        async with asyncio.timeout(STALL_S):
            await self._writer.drain()

    async def _send(self, item: Send) -> None:
        """The lease keeps the pages as they are; what an engine does not verify it does not use."""
        size = self._shelf.slot_bytes
        for at in range(item.first, item.first + item.pages):
            lease = self._holder.leases.get(item.lease)
            if lease is None or lease.writing or at >= len(lease.pages):
                raise Malformed("asked for pages that it has no lease on")
            slot = lease.pages[at].slot
            page = self._shelf.arena.view[slot * size : (slot + 1) * size]
            for begin in range(0, size, CHUNK):
                self._writer.write(page[begin : begin + CHUNK])
                await self._sent()
            self._shelf.stats.counters["sent_bytes"] += size

    async def _store(self, item: Store) -> None:
        lease = self._holder.leases.get(item.lease)
        size = self._shelf.slot_bytes
        if lease is None or not lease.writing or item.at >= len(lease.pages):
            raise Malformed("sent a page that it has no lease on")
        base = lease.pages[item.at].slot * size
        for at in range(0, size, CHUNK):
            async with asyncio.timeout(STALL_S):
                data = await self._reader.readexactly(min(CHUNK, size - at))
            self._shelf.arena.store(base + at, data)
        self._shelf.stats.counters["received_bytes"] += size
