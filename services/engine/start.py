"""From a configuration to a serving engine: build the device, size the page pool, run the service."""

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.engine.pages import Pages
from services.engine.plan import Device
from services.engine.prefix import Worth, space
from services.engine.prefix_source import Fetcher, Source
from services.engine.prefix_storer import Storer
from services.engine.prefix_tier import PrefixTier
from services.engine.schedule import Scheduler
from services.engine.service import Engine
from shared.config import ConfigError, EngineConfig
from shared.run import Life
from shared.vocab import fingerprint

SWITCH_S = 0.0005  # the device's thread must not wait while the loop publishes: Python's own 5 ms are a step of a small model


async def main(life: Life[EngineConfig], build: Callable[[EngineConfig], Device] | None = None) -> None:
    """`build` makes the device; the tests give a device without a model."""
    config = life.config
    life.detail = "loading weights"
    sys.setswitchinterval(SWITCH_S)
    # One thread builds the device and runs every step: a second one would bring a second team of OpenMP threads, and
    # libgomp lets teams sleep between operations once they outnumber the cores (36 ms a step instead of 11).
    thread = ThreadPoolExecutor(1, "device")
    device = await life.unless_stopped(asyncio.get_running_loop().run_in_executor(thread, build or _torch_device, config))
    if device is None:
        return
    scheduler = _scheduler(config, device)
    gc.freeze()  # the model is no garbage; and what a step makes is freed without a collector
    gc.set_threshold(50_000, 20, 100)
    gauges = life.stats.gauges
    gauges["running"] = lambda: len(scheduler.running)
    gauges["waiting"] = lambda: len(scheduler.waiting)
    gauges["free_blocks"] = lambda: scheduler.pages.free
    gauges["blocks"] = lambda: scheduler.pages.blocks
    tier = _tier(life, scheduler.pages, device, thread)
    if tier is not None:
        life.detail = "meeting the prefix cache"
        await life.unless_stopped(tier.connect())
    life.mark_ready(f"{device.blocks * config.block_size} tokens of KV in {device.blocks} blocks")
    await Engine(life, scheduler, device, thread, tier).serve()


def _tier(life: Life[EngineConfig], pages: Pages, device: Device, thread: ThreadPoolExecutor) -> PrefixTier | None:
    """The shared prefix cache, where one is configured."""
    config = life.config
    addresses = [address for address in config.prefix_caches.split(",") if address]
    if not addresses:
        return None
    mark = space(f"{fingerprint(Path(config.model))} {config.model_shape}", device.ferry.page_kind, config.block_size)
    worth = Worth(device.ferry.page_bytes, config.block_size)
    sources = [Source(address, mark, device.ferry.page_bytes, device.ferry) for address in addresses]
    fetcher = Fetcher(sources, device.ferry, worth, life.stats)
    storer = Storer(Source(addresses[0], mark, device.ferry.page_bytes, None), life.stats)
    return PrefixTier(pages, device, thread, mark, fetcher, storer, worth, life.stats)


def _scheduler(config: EngineConfig, device: Device) -> Scheduler:
    try:
        limits = device.limits
        return Scheduler(
            Pages(device.blocks, config.block_size), limits.token_budget, limits.max_running, limits.prefill_budget
        )
    except ValueError as error:
        raise ConfigError(f"HEADRACE_ENGINE_TOKEN_BUDGET, _MAX_RUNNING: {error}") from error


def _torch_device(config: EngineConfig) -> Device:
    # Threads that spin while they wait for each other stand still when anything else needs their core: spin briefly.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from services.engine.build import build  # torch takes seconds to import: the heartbeat is on its way by then

    return build(config)
