"""The prefix cache's loop: engines connect, find pages, reserve room and commit what they have written.

The engines of this host read and write the arena themselves; bytes pass through here only for engines of other hosts.
"""

import asyncio
import contextlib
import os
import stat

from services.prefix_cache.arena import Arena
from services.prefix_cache.shelf import Shelf
from services.prefix_cache.talk import AHEAD, Conversation
from shared.config import ConfigError, PrefixCacheConfig
from shared.run import Life

EXPIRE_EVERY_S = 1.0


async def main(life: Life[PrefixCacheConfig]) -> None:
    config = life.config
    if not config.socket and not config.listen:
        raise ConfigError(
            "set HEADRACE_PREFIX_CACHE_SOCKET for engines of this host, or HEADRACE_PREFIX_CACHE_LISTEN for others"
        )
    life.detail = "claiming memory"
    opening: asyncio.Future[Shelf | None] = asyncio.get_running_loop().create_future()
    async with contextlib.AsyncExitStack() as servers:
        for server in await listen(config, opening):
            await servers.enter_async_context(server)
        try:
            shelf = Shelf(await asyncio.to_thread(Arena, config.size_mb << 20), config.lease_s, life.stats)
        except ConfigError:
            opening.set_result(None)
            raise
        opening.set_result(shelf)
        life.mark_ready(f"{config.size_mb} MB for pages")
        while not life.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(life.stopping.wait(), EXPIRE_EVERY_S)
            shelf.expire()
        for conversation in list(shelf.open):
            conversation.abort()


async def listen(config: PrefixCacheConfig, opening: "asyncio.Future[Shelf | None]") -> list[asyncio.Server]:
    """Whoever comes before the shelf waits for it, in vain if it is None. Raises ConfigError when an address cannot be had."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shelf = await asyncio.shield(opening)
        if shelf is None:
            writer.close()
        else:
            await Conversation(shelf, reader, writer).run()

    servers = []
    try:
        if config.socket:
            _clear(config.socket)
            servers.append(await asyncio.start_unix_server(converse, config.socket))
            os.chmod(config.socket, stat.S_IRUSR | stat.S_IWUSR)
        if config.listen:
            host, _, port = config.listen.rpartition(":")
            servers.append(await asyncio.start_server(converse, host.strip("[]"), int(port), limit=AHEAD))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"HEADRACE_PREFIX_CACHE_SOCKET={config.socket} _LISTEN={config.listen}: {error}") from error
    return servers


def _clear(path: str) -> None:
    """What a predecessor left behind, if it is a socket."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
