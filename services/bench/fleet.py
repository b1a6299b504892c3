"""The client processes of a run: started, let loose at the same moment, heard to the end."""

import asyncio
import contextlib
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import asdict

import orjson

from services.bench.spec import Spec
from services.bench.timing import Timing

HEADSTART = 0.02  # s between the word "go" and the moment it names: every process has read it by then
PATIENCE = 5.0  # s that a stopped client gets to say what it had

Heard = Callable[[Timing], None]


class ClientDied(Exception):
    """A client process ended on its own; the figures lack what it did not say."""


class Fleet:
    """`stop()` may be called at any time, as often as one likes: then what is under way is reported as interrupted."""

    def __init__(self, spec: Spec, heard: Heard) -> None:
        self._spec, self._heard = spec, heard
        self._clients: list[Process] = []
        self._gate = asyncio.Barrier(spec.processes)
        self._origin = 0.0
        self._begin = 0.0
        self._ready = 0
        self._stopped = False

    async def run(self) -> None:
        """To the end of the last phase, or of the last client."""
        try:
            for process in range(self._spec.processes):
                if not self._stopped:
                    self._clients.append(await self._start(process))
            codes = await asyncio.gather(*[self._follow(client) for client in self._clients])
        finally:
            await self._end()
        if any(codes) and not self._stopped:
            raise ClientDied(f"{sum(code != 0 for code in codes)} of {len(codes)} client processes died")

    @property
    def origin(self) -> float:
        """When the clients were let loose, by the monotonic clock; 0 before."""
        return self._origin

    async def stop(self) -> None:
        """The end of its pipe tells a client to stop; phases that have not begun will not."""
        self._stopped = True
        await self._close()

    async def _close(self) -> None:
        for client in self._clients:
            if client.stdin is not None:
                client.stdin.close()
        await self._gate.abort()

    async def _start(self, process: int) -> Process:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.bench.worker",
            stdin=PIPE, stdout=PIPE, limit=1 << 20,
            start_new_session=True,  # a terminal's Ctrl-C is for us; the clients get the end of their pipe
        )  # fmt: skip
        self._tell(client, {"spec": asdict(self._spec), "process": process})
        return client

    def _tell(self, client: Process, message: dict[str, object]) -> None:
        if client.stdin is not None and not client.stdin.is_closing():
            client.stdin.write(orjson.dumps(message) + b"\n")

    async def _follow(self, client: Process) -> int:
        """One client's lines until it ends; its exit code."""
        assert client.stdout is not None
        async for line in client.stdout:
            message = orjson.loads(line)
            if "timing" in message:
                self._heard(Timing(**message["timing"]))
            elif await self._together():
                self._tell(client, {"begin": self._begin, "origin": self._origin})
        code = await client.wait()
        if code and not self._stopped:
            await self._close()  # the others would wait at the gate for ever
        return code

    async def _together(self) -> bool:
        """Waits until every client is ready; they then share one start moment. False when the run was stopped."""
        self._ready += 1
        if self._ready == self._spec.processes:  # the last one opens the gate
            self._ready = 0
            self._begin = time.monotonic() + HEADSTART
            self._origin = self._origin or self._begin
        try:
            await self._gate.wait()
        except asyncio.BrokenBarrierError:
            return False
        return True

    async def _end(self) -> None:
        for client in self._clients:
            if client.stdin is not None:
                client.stdin.close()
            try:
                await asyncio.wait_for(client.wait(), PATIENCE)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    client.kill()
                await client.wait()
