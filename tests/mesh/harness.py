"""A whole mesh of real processes for a test: broker, stages, restarts, and the ways to hurt them."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from services.up import gpus
from services.up.broker import Broker
from services.up.supervise import Child, stage_child
from shared.bus import Bus
from shared.config import MeshConfig, bundled_model

# A broker whose disk is full gets an error from its writes; one at its limit of file size would get a signal first.
DISK_MAY_FILL = ("/bin/sh", "-c", 'trap "" XFSZ; exec "$@"', "sh")
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@asynccontextmanager
async def within(timeout_s: float, what: str) -> AsyncIterator[list[str]]:
    """A time limit. Its TimeoutError says what was not reached, and why: what the list held last."""
    why: list[str] = []
    try:
        async with asyncio.timeout(timeout_s):
            yield why
    except TimeoutError:
        raise TimeoutError(f"{what} after {timeout_s} s: {', '.join(why)}") from None


class RunningMesh:
    """`chain`: engines whose tokens are a hash of their context (tests.chain) instead of the model."""

    def __init__(
        self,
        counts: Mapping[str, int] | None = None,
        chain: bool = False,
        env: Mapping[str, str] | None = None,
        model: str = "",
        one_port: bool = False,
        users: bool = False,
        through_proxy: bool = False,
        log: bool = False,
    ) -> None:
        self.counts = {"tokenizer": 1, "engine": 1, "streamer": 1} | dict(counts or {})
        self.chain = chain
        port = free_port()  # streamers may share one; with one each, a test can choose whom it talks to
        self.ports = [port if one_port else free_port() for _ in range(self.counts["streamer"])]
        self.broker = Broker()
        self.log = self.broker.folder / "stages.log"
        self._logged = log  # what stages log goes there instead of to the test's own errors
        self.users = users
        self.proxy_path = f"{self.broker.folder}/proxy.sock"  # where a test may listen, between the stages and the broker
        self.through_proxy = through_proxy
        self.model = model or bundled_model()
        self.env = {
            "HEADRACE_REDIS_URL": self.broker.url,
            "HEADRACE_MODEL": self.model,
            "HEADRACE_LOG": "warning",
            **(env or {}),
        }
        self.children: dict[str, Child] = {}
        self.tasks: list[asyncio.Task[None]] = []
        name = MeshConfig(id="test", model=self.model, model_shape=self.env.get("HEADRACE_MODEL_SHAPE", "")).served_name
        self.bus = Bus(self.url_as("operator"), name)

    @property
    def url(self) -> str:
        return self.url_of(0)

    def url_of(self, streamer: int) -> str:
        return f"http://127.0.0.1:{self.ports[streamer]}"

    def url_as(self, user: str) -> str:
        """The broker, as this user of compose/users.acl."""
        return self.broker.url.replace("unix://", f"unix://{user}:{user}-secret@") if self.users else self.broker.url

    @property
    def broker_command(self) -> list[str]:
        if not self.users:
            return self.broker.command
        template = (ROOT / "compose" / "users.acl").read_text()
        path = self.broker.folder / "users.acl"
        path.write_text(re.sub(r"([A-Z]+)_PASSWORD", lambda match: f"{match[1].lower()}-secret", template))
        return [*self.broker.command, "--aclfile", str(path)]

    def start(self, stage: str, number: int, env: Mapping[str, str] | None = None) -> Child:
        own = {"HEADRACE_STREAMER_PORT": str(self.ports[number])} if stage == "streamer" else {}
        own["HEADRACE_REDIS_URL"] = f"unix://{self.proxy_path}" if self.through_proxy else self.url_as(stage)
        own |= gpus.settings(number, self.counts["engine"], gpus.count_gpus()) if stage == "engine" else {}
        child = stage_child(stage, number, self.env | own | dict(env or {}))
        if stage == "engine" and self.chain:
            child.command = [sys.executable, "-m", "tests.chain"]
        return self._keep(child)

    def _keep(self, child: Child) -> Child:
        if self._logged:
            child.command = ["/bin/sh", "-c", 'exec "$@" 2>>"$0"', str(self.log), *child.command]
        self.children[child.name] = child
        self.tasks.append(asyncio.create_task(child.keep_alive()))
        return child

    async def __aenter__(self) -> "RunningMesh":
        self._keep(Child("broker", [*DISK_MAY_FILL, *self.broker_command], os.environ))
        for stage, count in self.counts.items():
            for number in range(count):
                self.start(stage, number)
        await self.until_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(child.end() for child in self.children.values() if child.name != "broker"))
        await self.bus.close()
        await self.children["broker"].end()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.broker.remove()

    async def until_ready(self, timeout_s: float = 60) -> None:
        """Every process is ready, and every streamer has seen so. Raises TimeoutError, which says who is not."""
        async with within(timeout_s, "not ready") as missing:
            while True:
                # The last heartbeat of a process that was killed is still there.
                alive = {
                    child.process.pid for child in self.children.values() if child.process and child.process.returncode is None
                }
                ready = [beat for beat in await self.bus.members() if beat.ready and beat.pid in alive]
                missing[:] = [name for name, n in self.counts.items() if sum(beat.stage == name for beat in ready) < n]
                if not missing:
                    break
                for task in self.tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.1)
            await asyncio.sleep(1.2)  # one heartbeat: a streamer admits when it has seen the others

    def kill(self, name: str, how: int = signal.SIGKILL) -> int:
        """Signal a process of the mesh; its supervisor starts it again if it dies. Returns its pid."""
        process = self.children[name].process
        assert process is not None
        process.send_signal(how)
        return process.pid

    async def drained(self, timeout_s: float = 10) -> None:
        """Wait until nothing is outstanding: no entry in a queue, no page in use. Raises TimeoutError, which says what is."""
        async with within(timeout_s, "not drained") as left:
            while True:
                depths = await self.bus.depths([self.bus.names.submit, self.bus.names.work])
                engines = [beat for beat in await self.bus.members() if beat.stage == "engine"]
                using = [beat for beat in engines if beat.gauges["free_blocks"] != beat.gauges["blocks"] - 1]
                left[:] = [f"queues {depths}", *(f"{beat.id} {beat.gauges}" for beat in using)]
                if not any(depths) and not using:
                    return
                await asyncio.sleep(0.1)

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with ClientSession() as client, client.post(f"{self.url}{path}", json=body) as response:
            return response.status, await response.json()
