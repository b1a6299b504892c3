"""Which jobs run here and when: refused, begun at once, loading a shared prefix first, or waiting to run alone. No broker."""

import asyncio
import time
from collections.abc import Callable

from services.engine.cancels import Cancels
from services.engine.job import Job
from services.engine.jobs import Jobs
from services.engine.prefix_tier import PrefixTier
from services.engine.schedule import Scheduler
from services.engine.sequence import Sequence
from shared.messages import Cancel, ErrorCode
from shared.stats import Stats

ALONE_AFTER, MAX_LOST = 2, 3  # engines lost with a request until it runs alone, and until it is given up as poison


class Admission:
    """`news` is set when the scheduler has something new; `ended` is told of every loading task that is over."""

    def __init__(
        self,
        scheduler: Scheduler,
        jobs: Jobs,
        stats: Stats,
        tier: PrefixTier | None,
        ended: Callable[["asyncio.Task[None]"], None],
    ) -> None:
        self._scheduler, self._jobs, self._stats, self._tier, self._ended = scheduler, jobs, stats, tier, ended
        self.cancels = Cancels()
        self.news = asyncio.Event()
        self._loading: dict[asyncio.Task[None], int] = {}  # how many sequences each will bring
        self._parked: list[Job] = []  # ours, and waiting to run alone

    @property
    def ours(self) -> list[Job]:
        return [*self._jobs.open.values(), *self._parked]

    def room(self) -> int:
        """Sequences that may come in. None beside a request that must be alone, or waits to be."""
        alone = self._parked or any(job.lost >= ALONE_AFTER for job in self._jobs.open.values())
        return 0 if alone else self._scheduler.max_running - self._scheduler.open - sum(self._loading.values())

    async def settled(self) -> None:
        """Wait until nothing is being loaded."""
        await asyncio.gather(*self._loading)

    # -- in --------------------------------------------------------------------------------------------------------

    def admit(self, job: Job) -> None:
        if (refusal := self.refusal(job)) is not None:
            self._jobs.fail(job, *refusal)
        else:
            self._enter(job)

    def take_over(self, job: Job) -> None:
        """Go on with what another engine had. What may have killed it must not kill others' requests again."""
        self._stats.counters["takeovers"] += 1
        self._stats.counters["replayed_tokens"] += sum(len(choice.ids) for choice in job.choices)
        if job.lost >= MAX_LOST:
            self._jobs.fail(job, "engine_crash", f"{MAX_LOST} engines were lost while they served this request")
        elif job.lost >= ALONE_AFTER and self._jobs.open:
            self._parked.append(job)
        else:
            self.admit(job)  # it may have been cancelled while its log was read

    def begin_parked(self) -> None:
        if self._parked and not self._jobs.open:
            self.admit(self._parked.pop(0))

    def refusal(self, job: Job) -> tuple[ErrorCode, str] | None:
        if 1000 * time.time() > job.work.deadline_ms:
            return "deadline_exceeded", "the request's time ran out before an engine was free"
        if self.cancels.covers(job.work.request, job.work.generation):
            return "cancelled", "cancelled before it began"
        return None

    def _enter(self, job: Job) -> None:
        self._jobs.open[job.work.request] = job
        for choice, reason in job.complete().items():
            self._jobs.end(job, choice, reason, time.monotonic())
        if self._tier is None:
            return self._schedule(job, job.sequences(self._scheduler.pages.block_size))
        task = asyncio.create_task(self._load(job, self._tier))
        self._loading[task] = job.work.sampling.n
        task.add_done_callback(self._loaded)

    async def _load(self, job: Job, tier: PrefixTier) -> None:
        """Bring what is worth bringing while others go on, unless the job is cancelled or lost meanwhile."""
        sequences = job.sequences(self._scheduler.pages.block_size)
        for sequence in sequences:
            await tier.load(sequence)
        if self._jobs.open.get(job.work.request) is job:
            self._schedule(job, sequences)

    def _loaded(self, task: "asyncio.Task[None]") -> None:
        del self._loading[task]
        self._jobs.freed.set()
        self._ended(task)

    def _schedule(self, job: Job, sequences: list[Sequence]) -> None:
        if not all(map(self._scheduler.fits, sequences)):
            self._jobs.fail(job, "prompt_too_long", "the prompt's modules do not fit into the engine's pages; use mode: exact")
            return
        for sequence in sequences:
            self._scheduler.add(sequence)
        for choice in range(job.work.sampling.n):
            if self.cancels.covers(job.work.request, job.work.generation, choice):
                self._cancel(job, choice)
        self.news.set()

    # -- out -------------------------------------------------------------------------------------------------------

    def lose(self, job: Job) -> None:
        """Somebody else has taken over; if the job has ended meanwhile, nothing is lost."""
        if job in self._parked:
            self._parked.remove(job)
            self._jobs.freed.set()
        if self._jobs.open.get(job.work.request) is job:
            self._stats.counters["leases_lost"] += 1
            self._jobs.drop(job)

    def expire(self) -> None:
        now_ms = 1000 * time.time()
        for job in [job for job in self._jobs.open.values() if now_ms > job.work.deadline_ms]:
            self._jobs.fail(job, "deadline_exceeded", "the request's time ran out")

    def hand_on(self) -> list[Job]:
        """Let go of all that is unfinished, for whoever comes next."""
        jobs, self._parked = self.ours, []
        for job in jobs:
            self._jobs.drop(job)
        return jobs

    def hear(self, item: Cancel) -> None:
        self.cancels.hear(item)
        job = self._jobs.open.get(item.request)
        if job is not None and job.work.generation <= item.generation:
            self._cancel(job, item.choice)

    def _cancel(self, job: Job, choice: int | None) -> None:
        if choice is None:
            self._jobs.fail(job, "cancelled", "cancelled")
            return
        now = time.monotonic()
        for sequence in self._scheduler.cancel(job.work.request, choice):
            self._jobs.end(job, sequence.choice, "cancelled", now)
