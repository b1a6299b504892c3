"""How many tokens texts have. A schema's are asked for with each of its uses, and counted once."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

MAX_REMEMBERED = 1 << 14


class Lengths:
    """`count` is asked for what is not remembered. Called from any thread."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count
        self._known: OrderedDict[bytes, int] = OrderedDict()  # by digest: texts may be long
        self._lock = Lock()

    def __call__(self, text: str) -> int:
        digest = hashlib.sha256(text.encode()).digest()
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
                return self._known[digest]
        length = self._count(text)
        with self._lock:
            self._known[digest] = length
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return length
