"""Who is stuck: a process that showed itself once, still exists, and shows itself no more. Pure."""

from collections.abc import Iterable

LOOK_S = 5.0
SILENT_S = 20.0  # longer than a broker's restart, a long collection of garbage, a laptop's nap


class Watch:
    def __init__(self) -> None:
        self._seen: dict[int, float] = {}  # by process id

    def stuck(self, now: float, showing: Iterable[int], alive: Iterable[int]) -> list[int]:
        """The processes to end. Call it only with a picture that the broker gave just now."""
        living = set(alive)
        self._seen = {pid: at for pid, at in self._seen.items() if pid in living}
        self._seen |= {pid: now for pid in showing if pid in living}
        return [pid for pid, at in self._seen.items() if now - at > SILENT_S]
