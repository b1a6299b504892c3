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

from services.engine.admission import Admission
from services.engine.cancels import Cancels
from services.engine.catch_up import catch_up
from services.engine.job import Job
from services.engine.jobs import Jobs
from services.engine.plan import Device
from services.engine.prefix_tier import PrefixTier
from services.engine.publish import Publisher
from services.engine.schedule import Scheduler
from shared import trace
from shared.bus import START, Bus
from shared.config import EngineConfig
from shared.connection import BusDown
from shared.messages import Cancel, Message, Work
from shared.readers import Delivery, Group, Tail
from shared.run import Life
from shared.tokenlog import Choice

GROUP = "engines"
INTAKE = 8  # entries read at once: small, so that a burst spreads over all engines
RETRY_S = 0.5
FIRST_S = 0.002  # the cores wait no longer than this for a first token to be told
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
        self.group = Group(self.bus, self.bus.names.work, GROUP, life.config.id)
        self.publisher = Publisher(self.bus, self.group)
        self.jobs = Jobs(scheduler, self.publisher, life.stats, tier)
        self.admission = Admission(scheduler, self.jobs, life.stats, tier, self._background_ended)
        self._preparing = True
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
        await self.admission.settled()
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
        self.admission.news.set()
        self.jobs.freed.set()

    # -- steps -----------------------------------------------------------------------------------------------------

    async def steps(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.life.stopping.is_set():
            with trace.span("host", "plan"):
                plan = self.scheduler.plan()
            if not plan.rows and not self.scheduler.in_flight:
                await self._rest()
                continue
            self.jobs.note_starts(plan)
            self.life.working_since = loop.time()
            sampled = await loop.run_in_executor(self.thread, self.device.run, plan)
            self.life.working_since = 0.0
            if sampled is not None:
                with trace.span("host", "commit"):
                    began = self.jobs.report(self.scheduler.commit(sampled))
                if began:
                    await self._tell_first()
            await self.publisher.room()
        await self._hand_on()

    async def _rest(self) -> None:
        """Nothing to run: the device gets ready for what may come, piece by piece, then waits for work."""
        self.admission.news.clear()
        if self._preparing:
            run = asyncio.get_running_loop().run_in_executor
            self._preparing = await run(self.thread, self.device.prepare)
        else:
            await self.admission.news.wait()

    async def _tell_first(self) -> None:
        """Somebody waits for a first token: it is told before the next step (unless that is under way) takes the cores."""
        await asyncio.sleep(0)
        if not self.scheduler.in_flight:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_S):
                    await self.publisher.flushed()

    # -- intake ----------------------------------------------------------------------------------------------------

    async def intake(self) -> None:
        while not self.life.stopping.is_set():
            self.admission.begin_parked()
            room = self.admission.room()
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
        if not job.work.resume or self.admission.refusal(job) is not None:
            self.publisher.put(job.work.partition, job.claim())
            self.admission.admit(job)
        elif await catch_up(self.bus, job):
            self.admission.take_over(job)
        else:
            self.publisher.ack(job.entry)

    # -- leases ----------------------------------------------------------------------------------------------------

    async def leases(self) -> None:
        """Keep what is ours alive, let go of what is not, and take over from engines that have gone silent."""
        while not self.life.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.life.stopping.wait(), self.group.look_again_s)
            try:
                ours = self.admission.ours  # before asking: what comes in meanwhile is not in the answer
                held = await self.group.refresh([job.entry for job in ours])
                for job in [job for job in ours if job.entry not in held]:
                    self.admission.lose(job)
                await self._reissue(await self.group.stale(INTAKE))
            except BusDown as error:
                log.warning("%s: %s", self.life.config.id, error)
            self.admission.expire()

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
        jobs = self.admission.hand_on()
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
                        self.admission.hear(item)
            except BusDown:
                await asyncio.sleep(RETRY_S)
        await tail.close()

    async def _forget_cancels(self) -> None:
        """The broker may have lost the attempts that these made room for; those before them count again."""
        self.admission.cancels = Cancels()
