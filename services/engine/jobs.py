"""The requests that this engine has open: what is said of them, and how each one ends. No I/O of its own."""

import asyncio
import time

from services.engine.job import Job
from services.engine.plan import Plan, Sampled
from services.engine.prefix_tier import PrefixTier
from services.engine.publish import Publisher
from services.engine.schedule import Scheduler
from services.engine.sequence import Sequence
from shared.messages import ErrorCode, FinishReason
from shared.stats import Stats


class Jobs:
    """Open jobs by request. `freed` is set whenever one has left."""

    def __init__(self, scheduler: Scheduler, publisher: Publisher, stats: Stats, tier: PrefixTier | None) -> None:
        self._scheduler, self._publisher, self._stats, self._tier = scheduler, publisher, stats, tier
        self.open: dict[str, Job] = {}
        self.freed = asyncio.Event()

    def note_starts(self, plan: Plan) -> None:
        """Count a step, and remember when a job first took part in one and how much of its prompt was found computed."""
        if not plan.rows:
            return
        self._count(plan)
        now = time.monotonic()
        for sequence in self._scheduler.planned:
            job = self.open.get(sequence.request)
            if job is None:
                continue
            job.started_at = job.started_at or now
            if not (job.counted or sequence.apart):
                job.counted, job.cached_tokens = True, sequence.cached - sequence.made
                self._stats.counters["cached_tokens"] += job.cached_tokens

    def _count(self, plan: Plan) -> None:
        counters = self._stats.counters
        counters["steps"] += 1
        counters["computed_tokens"] += plan.tokens
        counters["step_rows"] += len(plan.rows)
        counters["preemptions"] = self._scheduler.preemptions

    def report(self, advanced: list[tuple[Sequence, Sampled]]) -> bool:
        """Put each new token, and each end, where its client's streamer will read it. Is somebody's first token among them?"""
        now, began = time.monotonic(), False
        self._stats.counters["output_tokens"] += len(advanced)
        for sequence, sampled in advanced:
            job = self.open.get(sequence.request)
            if job is None:
                continue
            if sequence.broken:
                self.fail(job, "engine_crash", "the model gave no usable logits for this request")
                continue
            if not job.first_token_at:
                began = True
                self._began(job, sequence, now)
            fresh = job.fresh.get(sequence.choice)
            if fresh is None:
                job.fresh[sequence.choice] = [sampled]
                self._publisher.grow(job, sequence.choice)
            else:
                fresh.append(sampled)
            if sequence.done:
                if self._tier is not None:
                    self._tier.offer(sequence, len(sequence.tokens))
                self.end(job, sequence.choice, sequence.finish or "cancelled", now)
        return began

    def _began(self, job: Job, sequence: Sequence, now: float) -> None:
        """A job's first token: its prompt is computed, and if it has parts, or some of it was found, others may use it, too."""
        job.first_token_at = now
        if self._tier is not None:
            self._tier.worth.note_prefill(job.prompt_tokens - job.cached_tokens, now - job.started_at)
            if job.cached_tokens or sequence.parts:
                self._tier.offer(sequence, sequence.cached)

    def end(self, job: Job, choice: int, reason: FinishReason, now: float) -> None:
        """One choice is complete, and perhaps the whole job."""
        if job.choices[choice].end is None:
            self._publisher.put(job.work.partition, *job.tell(choice), job.end(choice, reason, now))
        if job.done:
            self._stats.counters["finished"] += 1
            self.close(job)

    def fail(self, job: Job, code: ErrorCode, text: str) -> None:
        self._publisher.put(job.work.partition, job.fail(code, text))
        self._stats.counters["cancelled" if code == "cancelled" else "failed"] += 1
        self.close(job)

    def close(self, job: Job) -> None:
        """Done with a job: its entry is acknowledged behind all that was said of it."""
        self.drop(job)
        self._publisher.ack(job.entry)

    def drop(self, job: Job) -> None:
        """Let go of a job without a word: it is somebody else's."""
        if self.open.get(job.work.request) is job:
            del self.open[job.work.request]
            self._scheduler.cancel(job.work.request)
        self.freed.set()
