"""What the engine has to say, in order: one XADD per partition for all that a step (or several, if we lag) produced.

Tokens become records only when they are sent, so the tokens of several steps of a choice are one record: the less time
there is, the less a token costs.
An acknowledgement goes out behind the records that were put before it, never earlier.
"""

import asyncio
from collections import defaultdict

from services.engine.job import Job
from shared import trace
from shared.bus import FIELD, Bus, entry_order
from shared.codec import encode_step
from shared.messages import LogRecord, TokensFields
from shared.readers import Group

MAX_LAG = 16  # steps whose records may be under way before the engine waits
PACE_S = 0.004  # at least so much from one sending to the next: what a small model says in it is told at once, and costs once


class Publisher:
    def __init__(self, bus: Bus, group: Group) -> None:
        self._bus, self._group = bus, group
        self._records: dict[str, list[LogRecord | TokensFields]] = defaultdict(list)
        self._growing: dict[tuple[str, int], Job] = {}  # (request, choice) with tokens to tell, behind the records
        self._acks: list[str] = []
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._steps = 0
        self._newest: dict[str, int] = {}  # per partition, the broker's time of our last entry in it

    def put(self, partition: str, *records: LogRecord | TokensFields) -> None:
        self._records[partition] += records
        self._wake()

    def grow(self, job: Job, choice: int) -> None:
        """A choice of a job has new tokens."""
        self._growing[job.work.request, choice] = job
        self._wake()

    def ack(self, entry: str) -> None:
        self._acks.append(entry)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._idle.clear()

    async def room(self) -> None:
        """Call once per step: waits while too much is unsent."""
        self._steps += 1
        if self._steps > MAX_LAG:
            await self._idle.wait()

    async def flushed(self) -> None:
        await self._idle.wait()

    async def work(self) -> None:
        """Send until cancelled. Raises BusDown when the broker stays away for the bus's patience."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                if not self._growing:
                    await asyncio.sleep(0)  # claims are in no hurry: the work they are for is begun first
                sent, tokens = loop.time(), bool(self._growing)
                with trace.span("publish", "publish"):
                    await self._send_all()
                if not self._news.is_set():
                    self._idle.set()
                if tokens:  # a claim must not hold up the first token
                    await asyncio.sleep(sent + PACE_S - loop.time())
        finally:
            self._idle.set()  # nobody waits for what will never be sent

    async def _send_all(self) -> None:
        records, self._records = self._records, defaultdict(list)
        growing, self._growing = self._growing, {}
        for (_, choice), job in growing.items():
            if told := job.tell(choice):
                records[job.work.partition] += told
        acks, self._acks = self._acks, []
        self._steps = 0
        await self._send(records)
        await self._group.ack(acks)

    async def _send(self, records: dict[str, list[LogRecord | TokensFields]]) -> None:
        if not records:
            return
        commands = [command for partition, said in records.items() for command in self._commands(partition, said)]
        begins = any(partition not in self._newest for partition in records)  # a log: then it ends, whoever dies here
        replies = await self._bus.run(commands, atomic=begins)
        for partition, entry in zip(records, replies[::2], strict=True):
            self._newest[partition] = entry_order(entry.decode())[0]
        self._forget()

    def _commands(self, partition: str, said: list[LogRecord | TokensFields]) -> list[tuple[object, ...]]:
        # Trimmed by the broker's own clock, as its last answer told it. Kept each time: a broker may have forgotten the log.
        stream, oldest = self._bus.names.tokens(partition), self._newest.get(partition, 0) - 1000 * self._bus.keep_s
        return [("XADD", stream, "MINID", "~", max(oldest, 0), "*", FIELD, encode_step(said)), self._bus.keeping(stream)]

    def _forget(self) -> None:
        """Partitions of streamers that are long gone."""
        long_ago = max(self._newest.values()) - 1000 * self._bus.keep_s
        for partition in [name for name, at in self._newest.items() if at < long_ago]:
            del self._newest[partition]
