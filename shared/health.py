"""Whether this process is alive and ready, as the mesh sees it: python -m shared.health STAGE

For the health checks of containers: a stage without a port shows itself by its heartbeat, which needs the broker, the
event loop and a service that says that it is ready. Exits with 0 (ready), 1 (not) or 2 (wrong use), and says why.
"""

import asyncio
import sys

from shared.bus import Bus
from shared.config import ConfigError, EngineConfig, MeshConfig, PrefixCacheConfig, StreamerConfig, TokenizerConfig, load
from shared.connection import BusDown, Refused

CONFIGS: dict[str, type[MeshConfig]] = {
    "tokenizer": TokenizerConfig,
    "engine": EngineConfig,
    "streamer": StreamerConfig,
    "prefix_cache": PrefixCacheConfig,
}
EXIT_NOT_READY, EXIT_USAGE = 1, 2
PATIENCE_S = 2.0  # a check that waits longer than its time-out says nothing


async def trouble(stage: str, config: MeshConfig) -> str:
    """Why the process of this stage and id is not ready; empty when it is."""
    bus = Bus(config.redis_url, config.served_name, PATIENCE_S)
    try:
        own = await bus.member(stage, config.id)
    except (BusDown, Refused) as error:
        return str(error)
    finally:
        await bus.close()
    if own is None:
        return f"no heartbeat of {stage} {config.id}"
    return "" if own.ready else own.detail


def check(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and what to say."""
    if len(arguments) != 1 or arguments[0] not in CONFIGS:
        return EXIT_USAGE, f"usage: python -m shared.health {'|'.join(CONFIGS)}"
    [stage] = arguments
    try:
        why = asyncio.run(trouble(stage, load(CONFIGS[stage], stage)))
    except ConfigError as error:
        return EXIT_USAGE, str(error)
    return (EXIT_NOT_READY, why) if why else (0, "ready")


if __name__ == "__main__":
    code, text = check(sys.argv[1:])
    sys.stdout.write(f"{text}\n")
    sys.exit(code)
