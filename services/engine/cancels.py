"""Cancellations that were heard, for a while: a request may be cancelled before its work arrives here. Pure."""

from collections import OrderedDict

from shared.messages import Cancel

REMEMBERED = 10_000
_WHOLE = -1


class Cancels:
    """The newest REMEMBERED of them; each holds for every attempt up to its generation."""

    def __init__(self) -> None:
        self._generations: OrderedDict[tuple[str, int], int] = OrderedDict()

    def hear(self, item: Cancel) -> None:
        key = (item.request, _WHOLE if item.choice is None else item.choice)
        self._generations[key] = max(item.generation, self._generations.get(key, -1))
        self._generations.move_to_end(key)
        if len(self._generations) > REMEMBERED:
            self._generations.popitem(last=False)

    def covers(self, request: str, generation: int, choice: int | None = None) -> bool:
        """Whether this attempt (or this choice of it) is cancelled."""
        key = (request, _WHOLE if choice is None else choice)
        return self._generations.get(key, -1) >= generation
