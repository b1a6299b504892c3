"""The engine's service: work in, merge steps on the device, tokens out. The only file here that knows asyncio and the bus.

Four tasks: *intake* takes work and gives it to the scheduler, *steps* plans, runs and commits, *leases* keeps (or loses)
what is ours, *control* hears cancellations. The device works in one thread of its own; the event loop never waits for it,
and a device that works ahead never waits for the loop: step k+1 runs while step k is committed and published.
"""

import asyncio
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from services.engine.cancels import Cancels
from services.engine.catch_up import catch_up
from services.engine.job import Job
from services.engine.jobs import Jobs
from services.engine.plan import Device
from services.engine.prefix_tier import PrefixTier
from services.engine.publish import Publisher
from services.engine.schedule import Scheduler
from services.engine.sequence import Sequence
from shared import trace
from shared.bus import START, Bus, BusDown
from shared.config import EngineConfig
from shared.messages import Cancel, ErrorCode, Message, Work
from shared.readers import Delivery, Group, Tail
from shared.run import Life
from shared.tokenlog import Choice

GROUP = "engines"
INTAKE = 8  # entries read at once: small, so that a burst spreads over all engines
ALONE_AFTER, MAX_LOST = 2, 3  # engines lost with a request until it runs alone, and until it is given up as poison
RETRY_S = 0.5
log = logging.getLogger("headrace")


class Engine:
    def __init__(
        self,
        life: Life[EngineConfig],
        scheduler: Scheduler,
        device: Device,
        thread: ThreadPoolExecutor,
        tier: PrefixTier | None,
    ) -> None:
        self.life, self.scheduler, self.device, self.thread, self.tier = life, scheduler, device, thread, tier
        self.bus: Bus = life.bus
        self.cancels = Cancels()
        self.group = Group(self.bus, self.bus.names.work, GROUP, life.config.id)
        self.publisher = Publisher(self.bus, self.group, life.config.keep_s)
        self.jobs = Jobs(scheduler, self.publisher, life.stats, tier)
        self.loading: dict[asyncio.Task[None], int] = {}  # how many sequences each will bring
        self.parked: list[Job] = []  # ours, and waiting to run alone
        self.news = asyncio.Event()
        life.on_new_broker = self._forget_cancels

    async def serve(self) -> None:
        """Run until told to stop, then hand what is unfinished to whoever comes next."""
        background = [asyncio.create_task(self.publisher.work())]
        if self.tier is not None:
            background.append(asyncio.create_task(self.tier.work()))
        async with asyncio.TaskGroup() as tasks:
            for work in (self.intake(), self.steps(), self.leases(), self.control(), self._wake_at_end()):
                tasks.create_task(work)
            for task in background:
                task.add_done_callback(self._background_ended)
        await asyncio.gather(*self.loading)
        await self._hand_on()  # what intake was still being given
        for task in background:
            task.cancel()
        await self.group.close()
        if self.tier is not None:
            self.tier.close()
        self.thread.shutdown()

    def _background_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.life.fail(f"cannot publish, store or load: {error}")
            self.life.stop()

    async def _wake_at_end(self) -> None:
        await self.life.stopping.wait()
        self.news.set()
        self.jobs.freed.set()

    # -- steps -----------------------------------------------------------------------------------------------------

    async def steps(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.life.stopping.is_set():
            with trace.span("host", "plan"):
                plan = self.scheduler.plan()
            if not plan.rows and not self.scheduler.in_flight:
                self.news.clear()
                await self.news.wait()
                continue
            self.jobs.note_starts(plan)
            self.life.working_since = loop.time()
            sampled = await loop.run_in_executor(self.thread, self.device.run, plan)
            self.life.working_since = 0.0
            if sampled is not None:
                with trace.span("host", "commit"):
                    began = self.jobs.report(self.scheduler.commit(sampled))
                if began:
                    await asyncio.sleep(0)  # a first token is on its way before the next step takes the cores
            await self.publisher.room()
        await self._hand_on()

    # -- intake ----------------------------------------------------------------------------------------------------

    async def intake(self) -> None:
        while not self.life.stopping.is_set():
            self._begin_parked()
            room = self._room()
            if room <= 0:
                self.jobs.freed.clear()
                await self.jobs.freed.wait()
                continue
            try:
                for delivery in await self.group.read(min(room, INTAKE)):
                    await self._take(delivery)
                await asyncio.sleep(0)  # what has come is planned before more is asked for
            except BusDown as error:
                log.warning("%s: %s", self.life.config.id, error)
                await asyncio.sleep(RETRY_S)

    def _room(self) -> int:
        """None beside a request that must be alone, or waits to be."""
        alone = self.parked or any(job.lost >= ALONE_AFTER for job in self.jobs.open.values())
        return 0 if alone else self.scheduler.max_running - self.scheduler.open - sum(self.loading.values())

    def _begin_parked(self) -> None:
        if not self.parked or self.jobs.open:
            return
        job = self.parked.pop(0)
        if (refusal := self._refusal(job)) is not None:
            self.jobs.fail(job, *refusal)
        else:
            self._enter(job)

    async def _take(self, delivery: Delivery) -> None:
        work = delivery.message
        if not isinstance(work, Work):
            await self.group.ack([delivery.entry])
        elif not delivery.again:
            await self._begin(Job(work, delivery.entry, time.monotonic(), [Choice() for _ in range(work.sampling.n)]))
        elif not self._has(delivery):  # else our pending list, read after a broken connection, names what we work on
            await self._reissue([delivery])

    def _has(self, delivery: Delivery) -> bool:
        return any(job.entry == delivery.entry for job in self.jobs.open.values())

    async def _begin(self, job: Job) -> None:
        before = self.jobs.open.get(job.work.request)
        if before is not None and before.epoch > job.epoch:
            self.publisher.ack(job.entry)
            return
        if before is not None:
            self.jobs.close(before)
        if (refusal := self._refusal(job)) is not None:
            self.publisher.put(job.work.partition, job.claim())
            self.jobs.fail(job, *refusal)
        elif not job.work.resume:
            self.publisher.put(job.work.partition, job.claim())
            self._enter(job)
        elif await catch_up(self.bus, job):
            self._take_over(job)
        else:
            self.publisher.ack(job.entry)

    def _take_over(self, job: Job) -> None:
        """Go on with what another engine had. What may have killed it must not kill others' requests again."""
        self.life.stats.counters["takeovers"] += 1
        self.life.stats.counters["replayed_tokens"] += sum(len(choice.ids) for choice in job.choices)
        if job.lost >= MAX_LOST:
            self.jobs.fail(job, "engine_crash", f"{MAX_LOST} engines were lost while they served this request")
        elif job.lost >= ALONE_AFTER and self.jobs.open:
            self.parked.append(job)
        else:
            self._enter(job)

    def _refusal(self, job: Job) -> tuple[ErrorCode, str] | None:
        if 1000 * time.time() > job.work.deadline_ms:
            return "deadline_exceeded", "the request's time ran out before an engine was free"
        if self.cancels.covers(job.work.request, job.work.generation):
            return "cancelled", "cancelled before it began"
        return None

    def _enter(self, job: Job) -> None:
        self.jobs.open[job.work.request] = job
        for choice, reason in job.complete().items():
            self.jobs.end(job, choice, reason, time.monotonic())
        if self.tier is None:
            return self._schedule(job, job.sequences())
        task = asyncio.create_task(self._load(job, self.tier))
        self.loading[task] = job.work.sampling.n
        task.add_done_callback(self._loaded)

    async def _load(self, job: Job, tier: PrefixTier) -> None:
        """Bring what is worth bringing while others go on, unless the job is cancelled or lost meanwhile."""
        sequences = job.sequences()
        for sequence in sequences:
            await tier.load(sequence)
        if self.jobs.open.get(job.work.request) is job and not self.life.stopping.is_set():
            self._schedule(job, sequences)

    def _loaded(self, task: "asyncio.Task[None]") -> None:
        del self.loading[task]
        self.jobs.freed.set()
        self._background_ended(task)

    def _schedule(self, job: Job, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)
        for choice in range(job.work.sampling.n):
            if self.cancels.covers(job.work.request, job.work.generation, choice):
                self._cancel(job, choice)
        self.news.set()

    # -- leases ----------------------------------------------------------------------------------------------------

    async def leases(self) -> None:
        """Keep what is ours alive, let go of what is not, and take over from engines that have gone silent."""
        while not self.life.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.life.stopping.wait(), self.group.look_again_s)
            try:
                ours = [*self.jobs.open.values(), *self.parked]  # before asking: what comes in meanwhile is not in the answer
                held = await self.group.refresh([job.entry for job in ours])
                for job in [job for job in ours if job.entry not in held]:
                    self._lose(job)
                await self._reissue(await self.group.stale(INTAKE))
            except BusDown as error:
                log.warning("%s: %s", self.life.config.id, error)
            self._expire()

    def _lose(self, job: Job) -> None:
        """Somebody else has taken over; if the job has ended meanwhile, nothing is lost."""
        if job in self.parked:
            self.parked.remove(job)
            self.jobs.freed.set()
        if self.jobs.open.get(job.work.request) is job:
            self.life.stats.counters["leases_lost"] += 1
            self.jobs.drop(job)

    def _expire(self) -> None:
        now_ms = 1000 * time.time()
        for job in [job for job in self.jobs.open.values() if now_ms > job.work.deadline_ms]:
            self.jobs.fail(job, "deadline_exceeded", "the request's time ran out")

    async def _reissue(self, deliveries: list[Delivery]) -> None:
        """An entry that was in an engine before becomes a new entry: its higher id outranks whoever still has the old one."""
        onward: list[tuple[str, Message]] = []
        for delivery in deliveries:
            if isinstance(delivery.message, Work):
                onward.append((self.bus.names.work, Job(delivery.message, delivery.entry, 0.0).handed_on(crashed=True)))
        await self.group.hand_on([delivery.entry for delivery in deliveries], onward)

    async def _hand_on(self) -> None:
        """Draining: running requests go on elsewhere at once, instead of making a rollout wait for them."""
        await self.publisher.flushed()
        if self.tier is not None:
            await self.tier.hand_over(self.scheduler.running)
        jobs, self.parked = [*self.jobs.open.values(), *self.parked], []
        for job in jobs:
            self.jobs.drop(job)
        items: list[tuple[str, Message]] = [(self.bus.names.work, job.handed_on(crashed=False)) for job in jobs]
        await self.group.hand_on([job.entry for job in jobs], items)

    # -- cancellation ----------------------------------------------------------------------------------------------

    async def control(self) -> None:
        control = self.bus.names.control
        tail = Tail(self.bus, {control: START})
        while not self.life.stopping.is_set():
            try:
                for _, _, item in await tail.read():
                    if isinstance(item, Cancel):
                        self._hear(item)
            except BusDown:
                await asyncio.sleep(RETRY_S)
        await tail.close()

    async def _forget_cancels(self) -> None:
        """The broker may have lost the attempts that these made room for; those before them count again."""
        self.cancels = Cancels()

    def _hear(self, item: Cancel) -> None:
        self.cancels.hear(item)
        job = self.jobs.open.get(item.request)
        if job is not None and job.work.generation <= item.generation:
            self._cancel(job, item.choice)

    def _cancel(self, job: Job, choice: int | None) -> None:
        if choice is None:
            self.jobs.fail(job, "cancelled", "cancelled")
            return
        now = time.monotonic()
        for sequence in self.scheduler.cancel(job.work.request, choice):
            self.jobs.end(job, sequence.choice, "cancelled", now)
