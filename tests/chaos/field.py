"""One run of one row: a mesh, its clients, the fault, and the oracles that look at what is left."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from tests.chaos.proxy import Proxy
from tests.chaos.user import Tally, User
from tests.mesh.harness import RunningMesh

USERS = 16


@dataclass
class Field:
    mesh: RunningMesh
    rng: random.Random
    proxy: Proxy | None = None
    tally: Tally = field(default_factory=Tally)
    history: list[tuple[float, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    killed: Counter[str] = field(default_factory=Counter)
    restarts: dict[str, int] = field(default_factory=dict)  # at the start

    def __post_init__(self) -> None:
        self.restarts = {name: child.restarts for name, child in self.mesh.children.items()}

    def died(self) -> dict[str, int]:
        """How often a process ended that nobody had killed."""
        now = {name: child.restarts - self.restarts.get(name, 0) for name, child in self.mesh.children.items()}
        return {name: count - self.killed[name] for name, count in now.items() if count > self.killed[name]}

    def note(self, what: str) -> None:
        self.history.append((round(time.monotonic() - self.started, 3), what))

    def kill(self, name: str, how: int) -> None:
        self.note(f"signal {how} to {name}")
        try:
            self.mesh.kill(name, how)
        except ProcessLookupError:
            self.note(f"{name} was dead already")
        else:
            self.killed[name] += how in (signal.SIGKILL, signal.SIGTERM)

    def any(self, stage: str) -> str:
        return f"{stage}-{self.rng.randrange(self.mesh.counts[stage])}"

    async def crowd(self, fault: Callable[["Field"], "asyncio.Future[None]"], seconds: float, users: int = USERS) -> None:
        """Users ask while the fault happens, and follow what they asked for to its end."""
        until = time.monotonic() + seconds
        streamers = self.mesh.counts["streamer"]
        crowd = [
            User(self.mesh, random.Random(self.rng.random()), self.tally, until, streamer=at % streamers, secret=41_001 + at)
            for at in range(users)
        ]
        running = [asyncio.create_task(user.run()) for user in crowd]
        await asyncio.sleep(0.5)
        await fault(self)
        await asyncio.gather(*running)


@dataclass
class Leak:
    """The resource oracle: what each process holds open, before and after."""

    before: dict[str, tuple[int, int]]

    @classmethod
    def start(cls, mesh: RunningMesh) -> "Leak":
        return cls(_held(mesh))

    def found(self, mesh: RunningMesh) -> list[str]:
        """Only of processes that lived through it; a few connections to the broker may have been opened for good."""
        after = _held(mesh)
        same = [(name, held, self.before[name]) for name, held in after.items() if self.before.get(name, (0, 0))[0] == held[0]]
        return [
            f"{name} holds {now} files, had {before}"
            for name, (_, now), (_, before) in same
            if now > before + 24 and name != "broker"
        ]


def _held(mesh: RunningMesh) -> dict[str, tuple[int, int]]:
    """By name: the process id and its open files."""
    found = {}
    for name, child in mesh.children.items():
        if child.process is not None and child.process.returncode is None:
            try:
                found[name] = child.process.pid, psutil.Process(child.process.pid).num_fds()
            except psutil.NoSuchProcess:
                continue
    return found


async def keys_without_expiry(mesh: RunningMesh) -> list[str]:
    """The log oracle's part that costs memory: what nobody would remove. Queues are empty at rest, `control` is trimmed."""
    names = mesh.bus.names
    kept = {names.submit, names.work, names.control, names.dead}
    [keys] = await mesh.bus.run([("KEYS", "*")])
    if not keys:
        return []
    ttls = await mesh.bus.run([("TTL", key) for key in keys])
    return [key.decode() for key, ttl in zip(keys, ttls, strict=True) if ttl == -1 and key.decode() not in kept]


async def unfinished(mesh: RunningMesh) -> list[str]:
    """The log oracle: nothing outstanding, nothing pending, no page in use."""
    try:
        await mesh.until_ready(timeout_s=30)
        await mesh.drained(timeout_s=15)
    except TimeoutError:
        depths = await mesh.bus.depths([mesh.bus.names.submit, mesh.bus.names.work])
        return [f"not drained: queues {depths}"]
    return []
