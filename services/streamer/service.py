"""The streamer's loop: follows the token log with one blocking read, however many clients it serves.

It also opens requests, attaches clients that come back (from any streamer), restores requests whose log was lost, and
cancels what nobody waits for. It holds connections and no authority: the log and the request's record decide.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from services.streamer.keys import ANYBODY, Key
from services.streamer.restore import restore
from services.streamer.session import Session
from services.streamer.timeline import timeline
from shared import trace
from shared.bus import Bus, entry_order
from shared.config import StreamerConfig
from shared.connection import BusDown
from shared.messages import Cancel, Record, Step, Submit
from shared.readers import Tail
from shared.run import Life
from shared.vocab import Vocab

RETRY_S = 0.5
SILENCE_S = 15.0  # after this long without news the broker is asked whether anybody still has the request
log = logging.getLogger("headrace")


Writer = Callable[[Record], Awaitable[bool]]  # opens a request in the broker; False where another has it already


class Taken(Exception):
    """Somebody else has opened the request that this was to be."""


class Streamer:
    """Requests of the clients that are connected to this process."""

    def __init__(self, life: Life[StreamerConfig], vocab: Vocab, position: str, partition: str) -> None:
        self.life, self.config, self.vocab = life, life.config, vocab
        self.bus: Bus = life.bus
        self.partition = partition
        self.sessions: dict[str, Session] = {}
        self.attaching: set[Session] = set()  # not served yet, but their partitions are followed
        self.orphans: dict[str, asyncio.TimerHandle] = {}
        self.tail = Tail(self.bus, {self.bus.names.tokens(partition): position})
        self.background: set[asyncio.Task[None]] = set()
        self.on_leave: Callable[[Session], None] = lambda _: None
        self.on_end: Callable[[Session], None] = lambda _: None
        self._closed = asyncio.Event()
        self.finished = asyncio.Event()  # set once the last client has been served

    # -- the loop --------------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        while not self.finished.is_set():
            try:
                for stream, entry, item in await self.tail.read():
                    self._dispatch(stream, entry, item)
            except BusDown as error:
                log.warning("%s: %s", self.config.id, error)
                await asyncio.sleep(RETRY_S)
        await self.tail.close()

    def _dispatch(self, stream: str, entry: str, item: object) -> None:
        partition = stream.removeprefix(self.bus.names.tokens(""))
        for record in item.records if isinstance(item, Step) else ():
            session = self.sessions.get(record.request)
            if session is not None and session.partition == partition:
                session.apply(entry, record)
                if session.conflict and not (session.restoring or session.done):
                    self.start(restore(self, session))

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the loop, and keep hold of it until it is done."""
        task = asyncio.get_running_loop().create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    # -- a request's life ------------------------------------------------------------------------------------------

    async def open(self, record: Record, key: Key = ANYBODY, write: Writer | None = None) -> Session:
        """Write the record, then submit: whoever attaches finds what it needs. Raises BusDown, and Taken if `write` may not."""
        session, written = Session(record, self.vocab), None
        session.key = key
        self.sessions[session.id] = session
        try:
            written = await (write or self._write)(record)
        finally:
            if written is None:  # no broker, or the client has left meanwhile: nobody will close this session
                self.close(session)
        if not written:
            self._forget(session)
            raise Taken
        self.life.stats.counters["requests"] += 1
        return session

    async def _write(self, record: Record) -> bool:
        await self.bus.open(record)
        return True

    def new_record(self, submit: Submit, stop: Sequence[str]) -> Record:
        return Record(submit=submit, stop=tuple(stop), connection=1)

    def log_position(self) -> str:
        return self.tail.positions[self.bus.names.tokens(self.partition)]

    def close(self, session: Session) -> None:
        """The client has its terminal event, or has left: stop serving, and stop engines from working for nobody."""
        self._forget(session)
        self.life.stats.counters["fenced_records"] += session.follower.fenced
        if log.isEnabledFor(logging.INFO):
            log.info("%s", timeline(session))
        self.on_end(session)
        if not (session.complete or session.follower.ended or session.superseded):
            self.start(self._cancel(session.record, None))

    def _forget(self, session: Session) -> None:
        if self.sessions.get(session.id) is session:
            del self.sessions[session.id]
            trace.client(session.id, session.clock.opened, session.clock.first)
            self._closed.set()
            self.on_leave(session)

    async def idle(self) -> None:
        """Wait until nobody is served."""
        while self.sessions:
            self._closed.clear()
            await self._closed.wait()

    def cancel_choice(self, session: Session, choice: int) -> None:
        """A stop string ended a choice here, before its engine knew."""
        if session.follower.choices[choice].end is None:
            self.start(self._cancel(session.record, choice))

    async def _cancel(self, record: Record, choice: int | None) -> None:
        try:
            item = Cancel(request=record.submit.request, generation=record.submit.generation, choice=choice)
            if choice is None:
                await self.bus.drop(item)
            else:
                await self.bus.append(self.bus.names.control, item)
        except BusDown as error:
            log.warning("%s: a cancellation was lost: %s", self.config.id, error)

    def detach(self, session: Session) -> None:
        """The client's socket is gone; it may come back, here or elsewhere, until the resume window has passed."""
        self._forget(session)
        if session.follower.ended or session.done:
            return
        loop = asyncio.get_running_loop()
        self.expected(session.id)
        self.orphans[session.id] = loop.call_later(
            self.config.resume_window_s, lambda: self.start(self._abandon(session.record))
        )

    def expected(self, request: str) -> None:
        """The client is here (again): nobody is waited for."""
        timer = self.orphans.pop(request, None)
        if timer is not None:
            timer.cancel()

    async def _abandon(self, record: Record) -> None:
        """Nobody came back to this streamer; if nobody came back anywhere, the request is cancelled."""
        self.orphans.pop(record.submit.request, None)
        now = await self.bus.load(record.submit.request)
        if now is not None and now.connection == record.connection:
            await self._cancel(now, None)

    def observe(self, session: Session) -> None:
        """Latencies as the client saw them."""
        clock, tokens = session.clock, sum(session.counts)
        if clock.first:
            self.life.stats.observe("ttft", clock.first - clock.opened)
        if tokens > 1:
            self.life.stats.observe("tpot", (clock.newest - clock.first) / (tokens - 1))
        self.life.stats.counters["streamed_tokens"] += tokens

    # -- when the log is lost -----------------------------------------------------------------------------------------

    async def restore_all(self) -> None:
        """The broker is another than before: it may have lost anything."""
        for stream, read in list(self.tail.positions.items()):  # a client may attach meanwhile
            end = await self.bus.last_entry(stream)
            # Back, if what was read is lost. Else it stays: a read is under way, and who attaches trusts where it began.
            if entry_order(end) < entry_order(read):
                self.tail.positions[stream] = end
        for session in list(self.sessions.values()):
            if not session.done:
                await restore(self, session)

    async def look_after(self) -> None:
        """Once a second: the time-out of requests, and those of which nothing is heard while nobody has them."""
        now, now_ms = time.monotonic(), 1000 * time.time()
        for session in list(self.sessions.values()):
            if now_ms > session.record.submit.deadline_ms + 2000:
                session.fail("deadline_exceeded", "the request's time ran out")
            elif session.conflict:
                await restore(self, session)
            elif not session.follower.ended and now - session.heard > self._patience_s(session):
                session.heard = now
                if await self._nobody_has(session):
                    await restore(self, session)
        await self._keep_partition()

    def _patience_s(self, session: Session) -> float:
        """Before an engine's claim it may wait in a queue, though hardly for longer than admission has foreseen."""
        return SILENCE_S if session.follower.claimed else SILENCE_S + 2 * self.config.max_wait_s

    async def _nobody_has(self, session: Session) -> bool:
        _, ms, seq = session.follower.epoch
        return not session.follower.claimed or not await self.bus.holds(self.bus.names.work, f"{ms}-{seq}")

    async def _keep_partition(self) -> None:
        """Partitions of streamers that are gone are followed only while somebody here needs them."""
        followed = {session.partition for session in (*self.sessions.values(), *self.attaching)}
        needed = {self.bus.names.tokens(name) for name in (self.partition, *followed)}
        for stream in [stream for stream in self.tail.positions if stream not in needed]:
            del self.tail.positions[stream]
        await self.bus.keep(self.bus.names.tokens(self.partition))


def new_request_id() -> str:
    return uuid.uuid4().hex
