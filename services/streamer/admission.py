"""Whether a request may come in: every limit is explicit, and a refusal says when to try again."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.config import StreamerConfig


@dataclass(frozen=True, slots=True)
class Overloaded(Exception):
    """HTTP 429 or 503 with Retry-After."""

    message: str
    status: int
    retry_after_s: int


class Pace:
    """How fast the mesh finishes requests while some are waiting.

    By finished requests, not by seconds: where an answer takes ten seconds, a second without an end says nothing.
    """

    ENOUGH, MANY = 8, 32  # requests that must have finished before this tells anything; and after which old ones count half

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None
        self._finished = self._seconds = 0.0

    def look(self, now: float, finished: float, waiting: int) -> None:
        """`finished` is counted since the engines' start. Only a mesh that is busy shows what it can do."""
        before, self._before = self._before, (now, finished) if waiting else None
        if before is None or finished < before[1] or now <= before[0]:
            return
        self._finished += finished - before[1]
        self._seconds += now - before[0]
        if self._finished > self.MANY:
            self._finished, self._seconds = self._finished / 2, self._seconds / 2

    def wait_s(self, waiting: int) -> float:
        return waiting * self._seconds / self._finished if self._finished >= self.ENOUGH else 0.0


def admit(config: StreamerConfig, open_here: int, queues: Mapping[str, int], missing: str, wait_s: float = 0.0) -> None:
    """`queues` are the mesh's queue depths, `missing` a stage without a ready process, `wait_s` the wait to be expected.

    Raises Overloaded.
    """
    if missing:
        raise Overloaded(f"no {missing} is ready yet", 503, 2)
    if open_here >= config.max_requests:
        raise Overloaded(f"this streamer serves {config.max_requests} requests already", 429, 1)
    if sum(queues.values()) >= config.max_queue:
        raise Overloaded(f"{config.max_queue} requests are waiting in the mesh already", 429, 5)
    if wait_s > config.max_wait_s:
        raise Overloaded(f"the wait would be {wait_s:.0f} s", 429, max(1, min(60, int(wait_s - config.max_wait_s))))
