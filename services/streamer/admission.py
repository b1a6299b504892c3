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


def admit(config: StreamerConfig, open_here: int, queues: Mapping[str, int], missing: str) -> None:
    """`queues` are the mesh's queue depths, `missing` a stage without a ready process. Raises Overloaded."""
    if missing:
        raise Overloaded(f"no {missing} is ready yet", 503, 2)
    if open_here >= config.max_requests:
        raise Overloaded(f"this streamer serves {config.max_requests} requests already", 429, 1)
    if sum(queues.values()) >= config.max_queue:
        raise Overloaded(f"{config.max_queue} requests are waiting in the mesh already", 429, 5)
