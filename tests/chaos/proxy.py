"""Between a stage and its broker: a Unix-socket proxy that delays, cuts, holds back and resets."""

import asyncio
import contextlib
import random
from dataclasses import dataclass, field


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class Trouble:
    delay_s: tuple[float, float] = (0.0, 0.0)
    cut_after: int = 0  # bytes, either way, until the connection is cut; 0 is never
    free: asyncio.Event = field(default_factory=_set)  # while it is not set nothing passes, and nobody is told
    reset_share: float = 0.0  # of the pieces that pass: the connection is reset instead


@dataclass
class Proxy:
    path: str
    behind: str
    rng: random.Random
    trouble: Trouble = field(default_factory=Trouble)
    cuts: int = 0

    async def __aenter__(self) -> "Proxy":
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_unix_server(self._connected, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            there_reader, there_writer = await asyncio.open_unix_connection(self.behind)
            both = [self._pass(reader, there_writer), self._pass(there_reader, writer)]
            pumps = [asyncio.create_task(each) for each in both]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                there_writer.transport.abort()
                writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.rng.randrange(1, self.trouble.cut_after) if self.trouble.cut_after else 0
        while piece := await reader.read(65536):
            await self.trouble.free.wait()
            if self.trouble.delay_s[1]:
                await asyncio.sleep(self.rng.uniform(*self.trouble.delay_s))
            if self.rng.random() < self.trouble.reset_share:
                self.cuts += 1
                return
            if self.trouble.cut_after:
                left = left or self.rng.randrange(1, self.trouble.cut_after)
                if len(piece) >= left:
                    writer.write(piece[:left])
                    self.cuts += 1
                    return
                left -= len(piece)
            writer.write(piece)
            await writer.drain()
