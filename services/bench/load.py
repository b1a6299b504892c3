"""When to ask what: the jobs of a run (pure), and two ways to do them: users in a closed loop, arrivals in time."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from services.bench import traces
from services.bench.prompts import Question, Source, Vocabulary, listed, shared, synthetic
from services.bench.spec import Spec
from services.bench.traces import Arrival, Scaling


@dataclass(frozen=True, slots=True)
class Job:
    """Request number `index`, due `at` seconds after the start."""

    index: int
    at: float
    question: Question


@dataclass(frozen=True, slots=True)
class Material:
    """What the run's files say, read once."""

    lines: Sequence[str] = ()
    arrivals: Sequence[Arrival] = ()


def material(spec: Spec) -> Material:
    """Reads the files of the run; OSError or ValueError says what is wrong with them."""
    lines: Sequence[str] = ()
    arrivals: Sequence[Arrival] = ()
    if spec.prompts is not None:
        with open(spec.prompts, encoding="utf-8") as file:
            lines = file.read().splitlines()
        listed(lines, spec.output_tokens)
    if spec.trace is not None:
        with open(spec.trace, encoding="utf-8", newline="") as file:
            arrivals = traces.read(spec.trace, file)
    return Material(lines, arrivals)


def vocabulary(spec: Spec) -> Vocabulary:
    return Vocabulary(*spec.vocab, words=spec.wordy)


def source(spec: Spec, found: Material) -> Source:
    if spec.prompts is not None:
        return listed(found.lines, spec.output_tokens)
    return synthetic(vocabulary(spec), spec.input_tokens, spec.output_tokens, spec.seed, spec.common_tokens)


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrival times with independent, exponentially distributed gaps of mean 1 / `rate`. Endless."""
    gaps = random.Random(f"{seed}/arrivals")
    at = 0.0
    while True:
        yield at
        at += gaps.expovariate(rate)


def replay(spec: Spec, arrivals: Sequence[Arrival], process: int) -> Iterator[Job]:
    """This process's requests of the trace, in order; prompts are made when they are due, not all at once."""
    scaling = Scaling(spec.input_scale, spec.output_scale, spec.time_scale, spec.max_input, spec.max_output)
    words = vocabulary(spec)
    for index in range(process, len(arrivals), spec.processes):
        arrival = traces.scale(arrivals[index], scaling)
        yield Job(index, arrival.at, traces.question(arrival, index, words, spec.seed))


def scheduled(spec: Spec, found: Material, process: int) -> Iterator[Job]:
    """Request i belongs to process i mod `processes`, so the processes together are one arrival process."""
    if spec.mode == "trace":
        return replay(spec, found.arrivals, process)
    ask = source(spec, found)
    times = poisson(spec.rate, spec.seed) if spec.mode == "open" else (0.0 for _ in count())
    return (Job(index, at, ask(index)) for index, at in enumerate(times) if index % spec.processes == process)


def phases(spec: Spec, found: Material, process: int) -> Iterator[Iterator[Job]]:
    """The run's parts; before each, all client processes wait for each other."""
    if spec.mode != "same":
        jobs = scheduled(spec, found, process)
        if spec.requests is not None:
            last = spec.requests
            jobs = takewhile(lambda job: job.index < last, jobs)
        if spec.duration is not None and spec.mode != "closed":
            end = spec.duration
            jobs = takewhile(lambda job: job.at < end, jobs)
        yield jobs
        return
    ask = shared(source(spec, found), spec.users)
    total = spec.requests or spec.users
    for first in range(0, total, spec.users):
        members = range(first, min(first + spec.users, total))
        yield (Job(index, 0.0, ask(index)) for index in members if index % spec.processes == process)


Ask = Callable[[Job, float], Awaitable[None]]  # the job, and when it was due on the monotonic clock
Refuse = Callable[[Job, float], None]


async def closed(jobs: Iterator[Job], users: int, begin: float, until: float | None, ask: Ask) -> None:
    """`users` users, each asking its next question when its last is answered; none is begun after `until`."""
    await _until(begin)

    async def user() -> None:
        while until is None or time.monotonic() < until:
            job = next(jobs, None)
            if job is None:
                return
            await ask(job, time.monotonic())

    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())


async def timed(jobs: Iterable[Job], begin: float, most: int, ask: Ask, refuse: Refuse) -> None:
    """Every job at its time, whatever became of the earlier ones.

    With `most` under way a job is refused, not delayed: a load that waits for the server is no longer an open loop.
    """
    under_way: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            due = begin + job.at
            await _until(due)
            if len(under_way) >= most:
                refuse(job, due)
                continue
            task = group.create_task(_run(ask, job, due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)


async def _run(ask: Ask, job: Job, due: float) -> None:
    await ask(job, due)


async def _until(moment: float) -> None:
    wait = moment - time.monotonic()
    await asyncio.sleep(max(0.0, wait))
