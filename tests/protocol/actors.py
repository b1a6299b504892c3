"""The mesh of a schedule: the real streamer, session, attach, restore, catch-up, job, group and tail; engines draw tokens
that are bound to their whole context, and the client checks each one against what it has."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from services.engine.cancels import Cancels
from services.engine.catch_up import catch_up
from services.engine.job import Job
from services.engine.plan import Sampled
from services.streamer.attach import attach
from services.streamer.service import Streamer
from services.streamer.session import Delta, Session, StreamError
from shared.bus import FIELD, START
from shared.codec import encode_step
from shared.config import StreamerConfig
from shared.connection import BusDown
from shared.messages import Cancel, FinishReason, Message, Record, Sampling, Submit, Work
from shared.readers import Group, Tail
from shared.stats import Stats
from shared.tokenlog import Choice
from tests.protocol.kernel import Kernel, Process, SimBus

STOP = 1
CONFIG = StreamerConfig(id="s", model="m")


class Tokens:
    """What engines draw. A token names its parent, so that it tells the whole context it was drawn from."""

    def __init__(self, rng: random.Random, greedy: float) -> None:
        self._random, self._greedy = rng, greedy
        self._parent: dict[int, tuple[int, int]] = {}
        self._favourite: dict[tuple[int, int], int] = {}
        self._stops: set[tuple[int, int]] = set()
        self.drawn = 0
        self.anew: set[str] = set()  # entries that engines were given as new: not to be continued after what the log tells

    def draw(self, choice: int, before: int) -> int:
        """The same again with probability `greedy`, as a deterministic engine would; else another one."""
        self.drawn += 1
        place = (choice, before)
        if place in self._favourite and self._random.random() < self._greedy:
            return self._favourite[place]
        if self._random.random() < 0.03:
            self._stops.add(place)
            return self._favourite.setdefault(place, STOP)
        token = len(self._parent) + 2
        self._parent[token] = place
        self._favourite.setdefault(place, token)
        return token

    def follows(self, token: int, choice: int, before: int) -> bool:
        return (choice, before) in self._stops if token == STOP else self._parent[token] == (choice, before)


def root(request: str) -> int:
    """What stands for the empty context of a request."""
    return -int(request)


class Engine:
    """Intake, steps, publisher, leases and control, as services/engine has them, in a few lines each."""

    def __init__(self, kernel: Kernel, process: Process, tokens: Tokens) -> None:
        self.kernel, self.tokens = kernel, tokens
        self.bus = SimBus(kernel, process.name)
        self.group = Group(self.bus, self.bus.names.work, "engines", process.name)
        self.jobs: dict[str, Job] = {}
        self.cancels = Cancels()
        self.said: list[Any] = []
        self.acks: list[str] = []
        for task in (self.intake(), self.steps(), self.publish(), self.leases(), self.control(), self.beats()):
            process.start(task)

    async def intake(self) -> None:
        while True:
            try:
                for delivery in await self.group.read(4):
                    work = delivery.message
                    if not delivery.again and isinstance(work, Work):
                        await self.begin(Job(work, delivery.entry, 0.0, [Choice() for _ in range(work.sampling.n)]))
                    elif delivery.entry not in {job.entry for job in self.jobs.values()}:
                        await self.reissue([delivery])
            except BusDown:
                await self.kernel.sleep(500)

    async def begin(self, job: Job) -> None:
        before = self.jobs.pop(job.work.request, None)
        if before is not None and before.epoch > job.epoch:
            self.jobs[job.work.request] = before
        elif self.cancels.covers(job.work.request, job.work.generation):
            self.said += [job.claim(), job.fail("cancelled", "cancelled before it began")]
        else:
            if not job.work.resume:
                self.said.append(job.claim())
                self.tokens.anew.add(job.entry)
            if not job.work.resume or await catch_up(self.bus, job):
                self.jobs[job.work.request] = job
                for choice, reason in job.complete().items():
                    self.end(job, choice, reason)
                return
        self.acks.append(job.entry)

    async def steps(self) -> None:
        while True:
            await self.kernel.until(lambda: bool(self.jobs) and len(self.said) < 8)
            await self.kernel.sleep(self.kernel.random.choice((20, 100, 400)))
            for job in list(self.jobs.values()):
                for at, choice in enumerate(job.choices):
                    if choice.end is None:
                        self.draw(job, at, choice)

    def draw(self, job: Job, at: int, choice: Choice) -> None:
        before = choice.ids[-1] if choice.ids else root(job.work.request)
        job.fresh[at] = [Sampled(self.tokens.draw(at, before))]
        self.said += job.tell(at)
        reason = job.complete().get(at)
        if reason is not None:
            self.end(job, at, reason)

    def end(self, job: Job, choice: int, reason: FinishReason) -> None:
        self.said.append(job.end(choice, reason, 0.0))
        if job.done:
            self.close(job)

    def close(self, job: Job) -> None:
        if self.jobs.get(job.work.request) is job:
            del self.jobs[job.work.request]
        self.acks.append(job.entry)

    async def publish(self) -> None:
        while True:
            await self.kernel.until(lambda: bool(self.said or self.acks))
            said, acks = self.said, self.acks
            self.said, self.acks = [], []
            if said:
                await self.bus.run([("XADD", self.bus.names.tokens("p"), "MINID", "~", 0, "*", FIELD, encode_step(said))])
            await self.group.ack(acks)

    async def leases(self) -> None:
        while True:
            await self.kernel.sleep(1000)
            ours = list(self.jobs.values())
            held = await self.group.refresh([job.entry for job in ours])
            for job in ours:
                if job.entry not in held and self.jobs.get(job.work.request) is job:
                    del self.jobs[job.work.request]
            await self.reissue(await self.group.stale(4))

    async def beats(self) -> None:
        known = await self.bus.incarnation()
        while True:
            await self.kernel.sleep(1000)
            now = await self.bus.incarnation()
            if now != known:
                self.cancels = Cancels()
            known = now

    async def reissue(self, deliveries: list[Any]) -> None:
        works = [(d.entry, d.message) for d in deliveries if isinstance(d.message, Work)]
        self.tokens.anew |= {entry for entry, work in works if not work.resume}
        onward: list[tuple[str, Message]] = [
            (self.bus.names.work, Job(work, entry, 0.0).handed_on(crashed=False)) for entry, work in works
        ]
        await self.group.hand_on([delivery.entry for delivery in deliveries], onward)

    async def control(self) -> None:
        tail = Tail(self.bus, {self.bus.names.control: START})
        while True:
            try:
                for _, _, item in await tail.read():
                    if isinstance(item, Cancel):
                        self.hear(item)
            except BusDown:
                await self.kernel.sleep(500)

    def hear(self, item: Cancel) -> None:
        self.cancels.hear(item)
        job = self.jobs.get(item.request)
        if job is not None and job.work.generation <= item.generation:
            if item.choice is None:
                self.said.append(job.fail("cancelled", "cancelled"))
                self.close(job)
            elif job.choices[item.choice].end is None:
                self.end(job, item.choice, "cancelled")


async def tokenizer(kernel: Kernel, process: Process) -> None:
    bus = SimBus(kernel, process.name)
    group = Group(bus, bus.names.submit, "tokenizers", process.name)
    while True:
        try:
            arrived = [*await group.read(4), *await group.stale(4)]
            onward: list[tuple[str, Message]] = [
                (bus.names.work, _work(delivery.message)) for delivery in arrived if isinstance(delivery.message, Submit)
            ]
            await group.hand_on([delivery.entry for delivery in arrived], onward)
        except BusDown:
            await kernel.sleep(500)


def _work(submit: Submit) -> Work:
    same = {name: getattr(submit, name) for name in Work.model_fields.keys() & Submit.model_fields.keys() - {"kind", "prompt"}}
    return Work(
        **same, prompt=b"\0\0\0\0", root=bytes(16), blocks=b"", tokenize_ms=0.0, resume=submit.generation > 0
    )  # fmt: skip


class SimStreamer(Streamer):
    """The real one; what it starts beside its loop becomes a task of its process."""

    def __init__(self, kernel: Kernel, process: Process, partition: str) -> None:
        bus, stats = SimBus(kernel, process.name), Stats()
        life: Any = SimpleNamespace(config=CONFIG, bus=bus, stats=stats)
        super().__init__(life, SimpleNamespace(tokenizer=None), START, partition)  # type: ignore[arg-type]
        self.kernel, self.process = kernel, process
        self.conflicts: list[Session] = []
        process.start(self.followed())
        process.start(self.beats())

    def start(self, work: Any) -> None:
        if work.__name__ == "restore":
            self.conflicts.append(work.cr_frame.f_locals["session"])
        self.process.start(work)

    def detach(self, session: Session) -> None:
        self._forget(session)

    async def followed(self) -> None:
        while True:
            try:
                for stream, entry, item in await self.tail.read():
                    self._dispatch(stream, entry, item)
            except BusDown:
                await self.kernel.sleep(500)

    async def beats(self) -> None:
        known = await self.bus.incarnation()
        while True:
            now = await self.bus.incarnation()
            if now != known:
                await self.restore_all()
            known = now
            await self.look_after()
            await self.kernel.sleep(1000)


class Socket:
    """A connection between the client and one session; frames of it that were not read are gone when it breaks."""

    def __init__(self, streamer: SimStreamer) -> None:
        self.streamer = streamer
        self.session: Session | None = None
        self.error: StreamError | None = None
        self._frames: Iterator[tuple[Delta, str]] = iter(())

    async def resume(self, request: str, cursor: str) -> None:
        try:
            self.session = await attach(self.streamer, request, cursor, "t")
        except StreamError as error:
            self.error = error

    async def open(self, record: Record) -> None:
        self.session = await self.streamer.open(record)

    def read(self) -> tuple[Delta, str, list[int]] | None:
        """The next frame: what is new, the cursor behind it, and the token ids."""
        session = self.session
        if session is None:
            return None
        frame = next(self._frames, None)
        if frame is None and not session.stopped and session.error is None:
            self._frames = session.frames(session._advance())
            frame = next(self._frames, None)
        if frame is None:
            self.error = session.error
            return None
        delta, cursor = frame
        return delta, cursor, list(session.follower.choices[delta.choice].ids[delta.first : delta.count])


def new_record(request: str, tokens: int, choices: int) -> Record:
    submit = Submit(
        request=request, tenant="t", partition="p", log_from=START, generation=0, given=(), ends=(), prompt="x",
        sampling=Sampling(n=choices, stop_ids=(STOP,)), max_tokens=tokens, deadline_ms=1 << 50,
    )  # fmt: skip
    return Record(submit=submit, stop=(), connection=1)
