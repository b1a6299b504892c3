"""A whole mesh on one machine: the broker, then the stages; progress until all are ready; the end in order."""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time

from rich.console import Console
from rich.logging import RichHandler
from rich.status import Status

from services.up.ask import AskFailed, ask
from services.up.broker import Broker
from services.up.gpus import count_gpus, settings
from services.up.options import Options, check_port
from services.up.supervise import Child, Unusable, stage_child
from services.up.watch import LOOK_S, Watch
from shared.bus import Bus
from shared.config import ConfigError, MeshConfig
from shared.connection import BusDown
from shared.host import usable_cores
from shared.messages import Beat
from shared.run import EXIT_FAILURE, EXIT_USAGE
from shared.vocab import load_vocab

START_LOOK_S = 0.2  # while starting; afterwards the supervisor sleeps until a process ends
BROKER_S = 10.0


async def serve(options: Options, console: Console) -> int:
    """Run a mesh until it is told to stop. Returns the exit code. Raises ConfigError."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    check_port(options.host, options.port)
    load_vocab(options.model)  # a model that cannot be read is one clear error, here; and the stages find it kept
    stopping = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    broker = None if options.redis_url else Broker()
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            return await _run(options, console, broker, stopping, folder)
    finally:
        if broker is not None:
            broker.remove()


async def _run(options: Options, console: Console, broker: Broker | None, stopping: asyncio.Event, folder: str) -> int:
    url = broker.url if broker else options.redis_url
    config = MeshConfig(
        id="up",
        redis_url=url,
        model=options.model,
        model_shape=options.shape,
        dtype=options.dtype,  # type: ignore[arg-type]
    )
    bus = Bus(url, config.served_name, patience_s=BROKER_S)
    children: list[Child] = []
    keeping: list[asyncio.Task[None]] = []
    watching: asyncio.Task[None] | None = None

    def keep(child: Child) -> None:
        children.append(child)
        keeping.append(asyncio.create_task(child.keep_alive()))

    try:
        if broker is not None:
            keep(Child("broker", broker.command, os.environ))
        try:
            await bus.incarnation()
        except BusDown as error:
            raise ConfigError(f"no broker answers at {url}: {error}; start one, or unset REDIS_URL to have your own") from error
        for child in _stages(options, url, folder):
            keep(child)
        watching = asyncio.create_task(_watch(bus, children))
        return await _until_stopped(options, console, bus, keeping, stopping)
    except BusDown as error:
        console.print(f"headrace: {error}", style="red", markup=False)
        return EXIT_FAILURE
    finally:
        if watching is not None:
            watching.cancel()
        await _end(children)
        await asyncio.gather(*keeping, return_exceptions=True)
        await bus.close()


async def _watch(bus: Bus, children: list[Child]) -> None:
    """End what is stuck: it is started again like anything that dies."""
    watch = Watch()
    while True:
        await asyncio.sleep(LOOK_S)
        alive = {child.process.pid: child for child in children if child.process and child.process.returncode is None}
        with contextlib.suppress(BusDown):
            showing = [beat.pid for beat in await bus.members()]
            for pid in watch.stuck(time.monotonic(), showing, alive):
                alive[pid].kill_stuck()


def _stages(options: Options, url: str, folder: str) -> list[Child]:
    env = {
        "HEADRACE_REDIS_URL": url,
        "HEADRACE_MODEL": options.model,
        "HEADRACE_MODEL_SHAPE": options.shape,
        "HEADRACE_DTYPE": options.dtype,
        "HEADRACE_ENGINE_THREADS": str(max(1, usable_cores() // options.counts["engine"])),
        "HEADRACE_STREAMER_HOST": options.host,
        "HEADRACE_STREAMER_PORT": str(options.port),
        "HEADRACE_TRACE": options.trace,
        "HEADRACE_LOG": "info" if options.verbose else "warning",
    }
    if options.prefix_cache_mb:
        socket = f"{folder}/prefix.sock"
        env |= {"HEADRACE_PREFIX_CACHE_SOCKET": socket, "HEADRACE_ENGINE_PREFIX_CACHES": socket}
        env["HEADRACE_PREFIX_CACHE_SIZE_MB"] = str(options.prefix_cache_mb)
    # The engine first: it takes longest.
    order = sorted(options.counts.items(), key=lambda item: item[0] != "engine")
    engines, gpus = options.counts["engine"], count_gpus()
    own = {stage: [settings(number, engines, gpus) if stage == "engine" else {} for number in range(n)] for stage, n in order}
    return [stage_child(stage, number, env | more) for stage, each in own.items() for number, more in enumerate(each)]


async def _end(children: list[Child]) -> None:
    """Stages first, the broker last: what they still have to say goes through it."""
    await asyncio.gather(*(child.end() for child in children if child.name != "broker"))
    await asyncio.gather(*(child.end() for child in children if child.name == "broker"))


async def _until_stopped(
    options: Options, console: Console, bus: Bus, keeping: "list[asyncio.Task[None]]", stopping: asyncio.Event
) -> int:
    stop = asyncio.create_task(stopping.wait())
    work = asyncio.create_task(_ready_and_ask(options, console, bus))
    waiting = {stop, *keeping, *([work] if options.ask else [])}
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()
        return 0
    except Unusable as error:
        console.print(f"headrace: {error} cannot run with this configuration (its message is above)", style="red", markup=False)
        return EXIT_USAGE
    except AskFailed as error:
        console.print(f"headrace: {error}", style="red", markup=False)
        return EXIT_FAILURE
    finally:
        for task in (stop, work):
            task.cancel()
        await asyncio.gather(stop, work, return_exceptions=True)


async def _ready_and_ask(options: Options, console: Console, bus: Bus) -> None:
    started = time.monotonic()
    with console.status("starting") as status:
        await _all_ready(options, bus, status)
    if options.ask:
        await ask(f"http://{options.host}:{options.port}", options.ask, Console())
        return
    url = f"http://{options.host}:{options.port}"
    console.print(f"[bold green]ready[/] in {time.monotonic() - started:.1f} s: {bus.names.model}")
    console.print(f"  chat       {url}/\n  OpenAI     {url}/v1\n  WebSocket  {url.replace('http', 'ws')}/v1/ws")
    console.print(f"  mesh       {url}/v1/mesh\n  metrics    {url}/metrics\n  stop with Ctrl-C")


async def _all_ready(options: Options, bus: Bus, status: Status) -> None:
    """Show what each stage is doing until every process that was asked for is ready."""
    while True:
        beats: list[Beat] = []
        with contextlib.suppress(BusDown):
            beats = await bus.members()
        waiting = {stage: n - sum(b.ready and b.stage == stage for b in beats) for stage, n in options.counts.items()}
        if not any(count > 0 for count in waiting.values()):
            return
        details = {beat.stage: beat.detail for beat in beats if not beat.ready}
        status.update(" · ".join(f"{stage}: {details.get(stage, 'starting')}" for stage, n in waiting.items() if n > 0))
        await asyncio.sleep(START_LOOK_S)
