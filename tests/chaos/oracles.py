"""What is looked at after each run: what processes hold, what is left in the broker, and who was shown a tenant's secret."""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
from aiohttp import ClientSession

from services.streamer.keys import digest
from tests.mesh.harness import RunningMesh

SETTLE_S = 10.0  # what a run needed is back by then
SECRET = re.compile(r"SECRET_([a-z]+)_[0-9]+")
KEYS = {"alice": "hr-KEY_alice", "bob": "hr-KEY_bob"}  # by tenant
TENANTS_ENV = {"HEADRACE_STREAMER_KEYS": "; ".join(f"{tenant} {digest(key)}" for tenant, key in KEYS.items())}


def secret(tenant: str, number: int) -> str:
    """What a client of this tenant puts into its requests, and nobody else may see."""
    return f"SECRET_{tenant}_{number}"


def headers(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[tenant]}"} if tenant in KEYS else {}


def foreign(text: str, tenant: str) -> list[str]:
    """Secrets in what a client of this tenant was told that are not its own."""
    return [found[0] for found in SECRET.finditer(text) if found[1] != tenant]


@dataclass(frozen=True)
class Held:
    """By one process. `tasks` and `memory` (resident, bytes) as its heartbeat tells them."""

    pid: int
    files: int
    tasks: int
    memory: int


# More than at the start: connections to the broker that stay open, a beat that is under way, what an allocator keeps.
MAY_KEEP = Held(pid=0, files=24, tasks=4, memory=16 << 20)


@dataclass
class Leak:
    """The resource oracle: what each process that lives through a run holds before and after it."""

    before: dict[str, Held]

    @classmethod
    async def start(cls, mesh: RunningMesh) -> "Leak":
        return cls(await _held(mesh))

    async def found(self, mesh: RunningMesh) -> list[str]:
        """Empty once all is back; else what is not, SETTLE_S later."""
        found: list[str] = []
        for _ in range(int(SETTLE_S)):
            found = self._more(await _held(mesh))
            if not found:
                break
            await asyncio.sleep(1)
        return found

    def _more(self, after: dict[str, Held]) -> list[str]:
        same = [(name, self.before[name], now) for name, now in after.items() if name in self.before]
        return [
            f"{name} holds {getattr(now, what):,} {what}, had {getattr(before, what):,}"
            for name, before, now in same
            for what in ("files", "tasks", "memory")
            if before.pid == now.pid and getattr(now, what) > getattr(before, what) + getattr(MAY_KEEP, what)
        ]


async def _held(mesh: RunningMesh) -> dict[str, Held]:
    found = {}
    for beat in await mesh.bus.members():
        process = child.process if (child := mesh.children.get(beat.id)) else None
        if process is not None and process.returncode is None and process.pid == beat.pid:
            gauges = beat.gauges
            files = psutil.Process(beat.pid).num_fds()
            found[beat.id] = Held(beat.pid, files, int(gauges["tasks"]), int(gauges["resident_bytes"]))
    return found


@dataclass
class Whispers:
    """The oracle of secrets: none may be in a log line or a metric, and no API key either."""

    log: Path
    read: int = 0

    async def found(self, mesh: RunningMesh) -> list[str]:
        said = self.log.read_bytes()[self.read :]
        self.read += len(said)
        told = [f"the log says {hit}" for hit in _secrets(said.decode(errors="replace"))]
        async with ClientSession(headers=headers(next(iter(KEYS)) if mesh.env.get("HEADRACE_STREAMER_KEYS") else "")) as http:
            for path in ("/metrics", "/v1/mesh"):
                async with http.get(f"{mesh.url}{path}") as response:
                    told += [] if response.status == 200 else [f"{path}: {response.status}"]
                    told += [f"{path} says {hit}" for hit in _secrets(await response.text())]
        return told


def _secrets(text: str) -> list[str]:
    keys = [key for key in KEYS.values() if key in text]
    return sorted({found[0] for found in SECRET.finditer(text)} | set(keys))[:3]


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
    except TimeoutError as error:
        return [str(error)]
    return []
