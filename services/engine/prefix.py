"""When a shared prefix is worth fetching, and what it is called: predictions from what was measured. Pure."""

import hashlib
from collections.abc import Sequence

from shared.blocks import HASH_BYTES, LAYOUT_VERSION, chain
from shared.fields import pack_ids
from shared.page import Label

LEAN = 0.3  # how far one measurement moves an average
LEAST_TOKENS = 64  # a measurement of less tells little, and fetching less gains little
LATENCY_S = 0.002  # of asking, beside the bytes
LONGEST_S = 2.0  # that a fetch may take, however long the prefill
# Bytes/s until measured: what good machines do. Too low a guess would never be tried, so never be corrected; too high a one
# costs one fetch, which ends when the prefill would have.
MEMORY, NETWORK = 20e9, 2e9
FORGET = 0.01  # how far an estimate goes back to the guess each time it decides against fetching


class Rate:
    """Units per second: a guess, if there is one, then an average that leans to what was seen last. 0 is unknown."""

    def __init__(self, guess: float = 0.0) -> None:
        self._guess = self.value = guess

    def note(self, units: float, seconds: float) -> None:
        if seconds > 0:
            seen = units / seconds
            self.value = seen if not self.value else self.value + LEAN * (seen - self.value)

    def doubt(self) -> None:
        """Not used, so not measured: it may have become better meanwhile."""
        self.value += FORGET * (self._guess - self.value)


class Worth:
    """What prefill and fetching cost here. A fetch may take as long as the prefill that it saves, and no longer."""

    def __init__(self, page_bytes: int, block_size: int) -> None:
        self._page_bytes, self._block_size = page_bytes, block_size
        self.prefill = Rate()  # tokens
        self._fetch: dict[str, Rate] = {}  # bytes, by the cache's address

    def fetch(self, address: str) -> Rate:
        return self._fetch.setdefault(address, Rate(MEMORY if address.startswith("/") else NETWORK))

    def prefill_s(self, pages: int) -> float:
        """Predicted; LONGEST_S at most, and as long as no prefill has been seen."""
        tokens, rate = pages * self._block_size, self.prefill.value
        return min(tokens / rate, LONGEST_S) if rate else LONGEST_S

    def gain_s(self, address: str, pages: int) -> float:
        """What fetching so many pages from that cache saves; negative where prefill is faster."""
        return self.prefill_s(pages) - LATENCY_S - pages * self._page_bytes / self.fetch(address).value

    def note_prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= LEAST_TOKENS:
            self.prefill.note(tokens, seconds)


def space(model: str, page_kind: str, block_size: int) -> bytes:
    """Names everything but the tokens that shapes a page: engines share pages only where this is equal.

    `model` is the fingerprint of what this engine has loaded, whatever the tokenizer that named the blocks has read.
    """
    parts = ("headrace-page", str(LAYOUT_VERSION), model, page_kind, str(block_size))
    return hashlib.sha256("\0".join(parts).encode()).digest()[:HASH_BYTES]


def whole_chain(hashes: Sequence[bytes], parent: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """The hashes of all full blocks of `tokens`, of which the first are known; `parent` is the next one's."""
    return [*hashes, *chain(parent, pack_ids(tokens[len(hashes) * block_size :]), block_size)]


def labels(space: bytes, hashes: Sequence[bytes], tokens: Sequence[int], first: int, block_size: int) -> list[Label]:
    """What the pages of a chain must claim to be, from block `first` on."""
    ids, width = pack_ids(tokens[first * block_size : len(hashes) * block_size]), 4 * block_size
    return [Label(space, hash, ids[at * width : (at + 1) * width]) for at, hash in enumerate(hashes[first:])]
