"""The streamer's web application: the API, the WebSocket, the page, health, metrics. And its start and end."""

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import WSCloseCode, web

from services.streamer.api import Api, errors
from services.streamer.door import Door
from services.streamer.doorstep import Doorstep
from services.streamer.gate import Gate, load_keys
from services.streamer.mesh import Mesh
from services.streamer.otel import ENDPOINT, exporter
from services.streamer.prompt_api import PromptApi
from services.streamer.quota import Tickets
from services.streamer.service import Streamer
from services.streamer.ws import handler
from shared.config import ConfigError, StreamerConfig
from shared.run import Life
from shared.vocab import load_vocab

PAGE = Path(__file__).parent / "page"
DRAIN_S = 3.0  # plain HTTP answers that are under way get this long; WebSocket clients resume elsewhere
LOOK_EVERY_S = 1.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def main(life: Life[StreamerConfig]) -> None:
    config = life.config
    keys = load_keys(config)
    life.detail = "reading the vocabulary"
    vocab = await asyncio.to_thread(load_vocab, config.model)
    partition = f"{config.id}-{uuid.uuid4().hex[:8]}"
    position = await life.bus.last_entry(life.bus.names.tokens(partition))
    streamer = Streamer(life, vocab, position, partition)
    if os.environ.get(ENDPOINT):
        streamer.on_end = exporter()
    mesh = Mesh(life.bus, config.served_name)
    door = Door(streamer, mesh)
    gate = Gate(config, keys, Tickets(life.bus))
    life.stats.gauges["open"] = lambda: len(streamer.sessions)
    life.stats.gauges["sockets"] = lambda: len(door.sockets)
    life.on_new_broker = streamer.restore_all
    life.on_beat = lambda: _each_second(door)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(streamer.follow())
        async with _listening(life, door, gate):
            life.mark_ready(f"http://{config.host}:{config.port}")
            await life.stopping.wait()
        streamer.finished.set()


async def _each_second(door: Door) -> None:
    await door.mesh.look()
    await door.streamer.look_after()
    await door.renew()


@asynccontextmanager
async def _listening(life: Life[StreamerConfig], door: Door, gate: Gate) -> AsyncIterator[None]:
    """Accept clients; at the end stop accepting first, let answers end, and send WebSocket clients elsewhere."""
    config = life.config
    doorstep = Doorstep()
    # Without cancellation a client that leaves during a prefill would not be noticed before the first write.
    runner = web.AppRunner(build(door, gate, doorstep), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, reuse_port=True, backlog=1024)
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another port") from error
    assert runner.server is not None
    sweeping = asyncio.create_task(doorstep.sweep(runner.server))
    try:
        yield
    finally:
        sweeping.cancel()
        await site.stop()
        await _drain(door)
        await runner.cleanup()


async def _drain(door: Door) -> None:
    """WebSocket clients are sent elsewhere at once; plain answers have DRAIN_S to end, and are told if they do not."""
    closing = [ws.close(code=WSCloseCode.SERVICE_RESTART, message=b"resume on another streamer") for ws in door.sockets]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            await asyncio.gather(*closing, return_exceptions=True)
            await door.streamer.idle()
    for session in list(door.streamer.sessions.values()):
        session.fail("overloaded", "this server is going down; ask again")


def build(door: Door, gate: Gate, doorstep: Doorstep) -> web.Application:
    app = web.Application(
        middlewares=[doorstep.middleware(), errors, gate.middleware()], client_max_size=door.streamer.config.max_body_bytes
    )
    app.add_routes(Api(door).routes())
    app.add_routes(PromptApi(door.schemas).routes())
    app.router.add_get("/v1/ws", handler(door))
    app.router.add_post("/v1/ticket", gate.ticket)
    app.router.add_get("/v1/mesh", lambda request: _mesh(door))
    app.router.add_get("/metrics", lambda request: _metrics(door))
    app.router.add_get("/healthz", lambda request: _health(True, "alive"))
    app.router.add_get("/readyz", lambda request: _health(not door.mesh.missing, door.mesh.missing or "ready"))
    app.router.add_get("/", _index)
    app.router.add_static("/page", PAGE)
    app.on_response_prepare.append(_secure)
    return app


async def _index(_: web.Request) -> web.FileResponse:
    return web.FileResponse(PAGE / "index.html")


async def _mesh(door: Door) -> web.Response:
    return web.json_response(door.mesh.as_json())


async def _metrics(door: Door) -> web.Response:
    return web.Response(body=door.mesh.exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _health(good: bool, text: str) -> web.Response:
    return web.json_response({"status": text if good else f"waiting for {text}"}, status=200 if good else 503)


async def _secure(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers.pop("Server", None)
