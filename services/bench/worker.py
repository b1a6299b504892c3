"""One client process: asks its share of the questions and writes one JSON line per answer to its parent.

Down the pipe come the spec, then one line with the start moment for every phase; the end of the pipe means stop, so a
client never outlives its parent. Up the pipe go {"ready": phase} and {"timing": {...}}.
"""

import asyncio
import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import orjson
import uvloop

from services.bench import load
from services.bench.client import Client
from services.bench.metrics import INTERRUPTED
from services.bench.spec import Spec, spread
from services.bench.timing import Timing

FAR = 1 << 40  # no run has that many requests
REFUSED = "not sent: the client's limit of requests under way"


@dataclass(frozen=True, slots=True)
class Share:
    """What this process is in the run."""

    spec: Spec
    process: int

    @property
    def users(self) -> int:
        return spread(self.spec.users, self.process, self.spec.processes)

    @property
    def most(self) -> int:
        if self.spec.mode == "same":
            return max(1, self.users)
        return max(1, spread(self.spec.max_inflight, self.process, self.spec.processes))


def say(message: dict[str, object]) -> None:
    """One line up the pipe. A parent that reads no more is gone, and the end of our own pipe is about to say so."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(orjson.dumps(message) + b"\n")
        sys.stdout.buffer.flush()


async def ask(client: Client, origin: float, job: load.Job, due: float) -> None:
    sent = time.monotonic()
    try:
        timing = await client.ask(job, due, origin)
    except asyncio.CancelledError:
        say({"timing": asdict(Timing(job.index, sent - origin, failure=INTERRUPTED))})
        raise
    say({"timing": asdict(timing)})


def refuse(origin: float, job: load.Job, due: float) -> None:
    say({"timing": asdict(Timing(job.index, due - origin, failure=REFUSED))})


async def warm_up(client: Client, share: Share, found: load.Material) -> None:
    """Questions that nobody counts, numbered so that they leave no prefix behind."""
    mine = spread(share.spec.warmup, share.process, share.spec.processes)
    question = load.source(share.spec, found)
    first = FAR + share.process
    jobs = (load.Job(-1, 0.0, question(first + number * share.spec.processes)) for number in range(mine))

    async def unheard(job: load.Job, due: float) -> None:
        await client.ask(job, due, due)

    await load.closed(jobs, min(mine, share.users), 0.0, None, unheard)


async def run(client: Client, share: Share, jobs: Iterator[load.Job], begin: float, origin: float) -> None:
    spec = share.spec
    if spec.mode == "closed":
        until = None if spec.duration is None else begin + spec.duration
        await load.closed(jobs, share.users, begin, until, partial(ask, client, origin))
    else:
        await load.timed(jobs, begin, share.most, partial(ask, client, origin), partial(refuse, origin))


async def work() -> None:
    """Phase by phase, until the parent closes the pipe."""
    pipe = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), sys.stdin)
    hello = orjson.loads(await pipe.readline())
    share = Share(Spec(**hello["spec"]), hello["process"])
    found = load.material(share.spec)
    async with Client(share.spec) as client:
        order = asyncio.create_task(pipe.readline())
        warming = asyncio.create_task(warm_up(client, share, found))
        await first_of(warming, order)
        for number, jobs in enumerate(load.phases(share.spec, found, share.process)):
            say({"ready": number})
            line = await order
            if not line:
                return
            go = orjson.loads(line)
            order = asyncio.create_task(pipe.readline())
            await first_of(asyncio.create_task(run(client, share, jobs, go["begin"], go["origin"])), order)
        order.cancel()


async def first_of(task: asyncio.Task[None], order: asyncio.Task[bytes]) -> None:
    """Waits for the task; a word from the parent in the meantime can only be its end, which ends the task."""
    await asyncio.wait({task, order}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def many_sockets() -> None:
    """As many open files as the system lets us: a thousand users are a thousand sockets."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    many_sockets()
    uvloop.run(work())
