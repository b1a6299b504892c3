"""A prefix cache as a real process beside a real broker, alone with clients of its own or among engines."""

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from services.engine.prefix_client import CacheDown, Client, Lease, Pages
from shared.page import BadPage, Label, checksum, claim, head
from tests.mesh.harness import RunningMesh, free_port

SPACE = b"space-of-a-model"
PAGE = 100_000
SIZE_MB = 2  # 20 slots of 102,400 bytes and their header
SLOTS = (SIZE_MB << 20) // (4096 + 102_400)
ENTER_S = 20.0
NOTHING = {"tokenizer": 0, "engine": 0, "streamer": 0}


def write(client: Client, lease: Lease, at: int, label: Label, payload: bytes, instead: bytes = b"") -> None:
    """A page, summed as on a CPU; with another payload than its header says."""
    client.write(lease, at, head(label, len(payload), checksum(payload)), instead or payload)


def trouble(pages: Pages, at: int, label: Label) -> str:
    """Why a page of that kind is not the one with this label; empty when it is."""
    try:
        return "" if claim(pages.header(at), label, pages.size) == checksum(pages.payload(at)) else "checksum"
    except BadPage as bad:
        return str(bad)


class CacheMesh(RunningMesh):
    """No stage but the cache; `socket` and `listen` are its addresses."""

    def __init__(self, lease_s: float = 10.0, size_mb: int = SIZE_MB) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="headrace-")
        self.socket = str(Path(self.folder.name) / "prefix.sock")
        self.listen = f"127.0.0.1:{free_port()}"
        env = {
            "HEADRACE_PREFIX_CACHE_SOCKET": self.socket,
            "HEADRACE_PREFIX_CACHE_LISTEN": self.listen,
            "HEADRACE_PREFIX_CACHE_SIZE_MB": str(size_mb),
            "HEADRACE_PREFIX_CACHE_LEASE_S": str(lease_s),
        }
        super().__init__({**NOTHING, "prefix_cache": 1}, env=env)

    async def __aexit__(self, *args: object) -> None:
        await super().__aexit__(*args)
        self.folder.cleanup()

    @contextmanager
    def client(self, address: str = "", page_bytes: int = PAGE, seconds: float = 60.0) -> Iterator[Client]:
        client = Client(address or self.socket, SPACE, page_bytes, seconds)
        try:
            yield client
        finally:
            client.close()

    def _enter(self, page_bytes: int) -> None:
        """Be the only engine there for a moment. Raises CacheDown, which says what stands in the way, after ENTER_S."""
        until = time.monotonic() + ENTER_S
        while True:
            try:
                with self.client(page_bytes=page_bytes, seconds=ENTER_S):
                    return
            except CacheDown:
                if time.monotonic() > until:
                    raise
            time.sleep(0.02)

    def empty(self) -> None:
        """Pages of another size divide the memory anew, once nobody else is there."""
        self._enter(1)
        self._enter(PAGE)


class EngineMesh(RunningMesh):
    """Engines that share a cache: without a model (steps are slow enough for fetching to pay), or with one."""

    def __init__(
        self,
        engines: int,
        size_mb: int = 16,
        caches: str = "",
        port: int = 0,
        chain: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="headrace-")
        socket = str(Path(self.folder.name) / "prefix.sock")
        settings = {
            "HEADRACE_PREFIX_CACHE_SOCKET": socket,
            "HEADRACE_PREFIX_CACHE_LISTEN": f"127.0.0.1:{port}" if port else "",
            "HEADRACE_PREFIX_CACHE_SIZE_MB": str(size_mb),
            "HEADRACE_ENGINE_PREFIX_CACHES": caches or socket,
            "HEADRACE_ENGINE_TOKEN_BUDGET": "128" if chain else "0",
            "HEADRACE_ENGINE_PREFILL_BUDGET": "128" if chain else "0",
            "HEADRACE_ENGINE_MAX_RUNNING": "16" if chain else "0",
            "CHAIN_STEP_S": "0.02",
        }
        super().__init__({"engine": engines, "prefix_cache": 1}, chain=chain, env=settings | dict(env or {}))

    async def __aexit__(self, *args: object) -> None:
        await super().__aexit__(*args)
        self.folder.cleanup()

    async def found(self) -> dict[str, float]:
        """How much of all prompts was not computed, and what the engines tell of the cache."""
        await asyncio.sleep(1.2)  # a heartbeat: what they have counted
        beats = await self.bus.members()
        names = {name for beat in beats for name in beat.counters if name.startswith("prefix_")}
        total = {name: sum(beat.counters.get(name, 0) for beat in beats) for name in ("cached_tokens", "prompt_tokens", *names)}
        return {"found": total["cached_tokens"] / total["prompt_tokens"], **total}

    async def forget(self, name: str = "engine-0") -> None:
        """Another process takes the engine's place: only what the cache holds is known to it."""
        old = self.kill(name)
        async with asyncio.timeout(30):
            while True:
                if any(beat.id == name and beat.pid != old and beat.ready for beat in await self.bus.members()):
                    return
                await asyncio.sleep(0.05)
