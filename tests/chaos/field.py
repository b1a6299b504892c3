"""One run of one row: a mesh, its clients, the fault."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from services.streamer.keys import LOCAL
from tests.chaos.oracles import KEYS
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
        tenants = tuple(KEYS) if self.mesh.env.get("HEADRACE_STREAMER_KEYS") else (LOCAL,)
        crowd = [
            User(self.mesh, random.Random(self.rng.random()), self.tally, until, streamer=at % streamers, number=at + 1,
                 tenant=tenants[at % len(tenants)])
            for at in range(users)
        ]  # fmt: skip
        running = [asyncio.create_task(user.run()) for user in crowd]
        await asyncio.sleep(0.5)
        await fault(self)
        await asyncio.gather(*running)
