"""A connection to the broker: timeouts, what is worth repeating, and for how long.

Every write of ours is safe to repeat (DESIGN: the token log's rules drop duplicates), so a write whose reply was lost is sent
again by us, never by the client library. Blocking readers have a connection of their own and end by a flag, because a
cancelled group read strands entries.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

BLOCK_MS = 1000

_T = TypeVar("_T")
_TRANSIENT_REPLIES = {"LOADING", "BUSY", "MISCONF", "OOM", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN"}


class BusDown(Exception):
    """The broker cannot be reached, or refuses to work, for longer than the caller would wait."""


class Refused(Exception):
    """The broker's own error reply to a command."""


def connect(url: str, connections: int, timeout_s: float) -> "Redis":
    # protocol 2: under RESP3 the library skips its check for unread replies on a pooled connection. No driver_info: the
    # command that would send it is newer than Redis 7.0.
    pool = BlockingConnectionPool.from_url(
        url, max_connections=connections, timeout=timeout_s, socket_timeout=timeout_s, socket_connect_timeout=2,
        protocol=2, driver_info=None, retry=Retry(NoBackoff(), 0), retry_on_error=[],
    )  # fmt: skip
    client = Redis.from_pool(pool)
    client.response_callbacks.clear()  # replies as the protocol has them, whatever shapes a release of the library prefers
    return client


def _words(error: RedisError) -> str:
    """What the broker said, its code first: the library keeps some codes apart, and wraps all that a pipeline was told."""
    said = str(error)
    if error.status_code:
        return f"{error.status_code} {said}"
    _, wrapped, inner = said.partition(" of pipeline caused error: (")
    return inner[1:] if wrapped else said


def _transient(error: RedisError) -> bool:
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        return True
    return isinstance(error, ResponseError) and _words(error).partition(" ")[0] in _TRANSIENT_REPLIES


@dataclass(slots=True)
class Patience:
    """How long to wait for a broker that is away. Mutable: a process that is ending has less of it."""

    seconds: float


AT_ONCE = Patience(0)


async def _cancellable(call: Awaitable[_T]) -> _T:
    """The library sends with `wait_for`, which until Python 3.12 forgets a cancellation that comes as the sending ends."""
    task = asyncio.current_task()
    asked = task.cancelling() if task else 0
    result = await call
    if task and task.cancelling() > asked:
        raise asyncio.CancelledError
    return result


async def patiently(call: Callable[[], Awaitable[_T]], patience: Patience) -> _T:
    """Repeat an idempotent call through broker trouble, with backoff. Raises BusDown in the end, Refused at once."""
    loop = asyncio.get_running_loop()
    started, pause = loop.time(), 0.02
    while True:
        try:
            return await _cancellable(call())
        except RedisError as error:
            if not _transient(error):
                raise Refused(_words(error)) from error
            if loop.time() + pause > started + patience.seconds:
                raise BusDown(f"broker: {error}") from error
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)


class Line:
    """A connection of its own, for one blocking reader. Never retries: the reader knows what a lost reply means."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url, connections=1, timeout_s=BLOCK_MS / 1000 + 3)

    async def close(self) -> None:
        await self._redis.aclose()

    async def execute(self, *command: Any) -> Any:
        """Raises BusDown when the connection or the broker fails, Refused for an error reply."""
        return await patiently(lambda: self._redis.execute_command(*command), AT_ONCE)
