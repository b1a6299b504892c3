"""An engine without a model: each token is a function of a hash of its whole context, read back from the pages.

One lost, doubled, reordered or spliced token, or one wrong page, changes every token after it, so a client that knows the
function sees the fault at that token. Run it as an engine process: python -m tests.chain
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from services.engine.plan import PENDING, Draw, Landed, Limits, Plan, Sampled
from services.engine.start import main
from shared import trace
from shared.config import EngineConfig
from shared.fields import pack_ids, unpack_ids
from shared.page import checksum
from shared.run import run

FIRST, LAST = 1000, 40000  # plain words of the vocabulary, no special tokens
BLOCKS = int(os.environ.get("CHAIN_BLOCKS", "8192"))
LAST_PAGE_ONLY = "CHAIN_LAST_PAGE" in os.environ  # a token of the same price in a long context, to measure all the rest
# Tokens of a prompt that hurt: the engine dies, has no memory, or gets no usable logits.
KILLS, STARVES, BREAKS = 45_001, 45_002, 45_003
PIECES = 4  # of getting ready
LIMITS = Limits(max_running=64, token_budget=512, prefill_budget=512)


def next_token(context: Sequence[int], choice: int) -> int:
    """The chain's rule."""
    digest = hashlib.blake2b(pack_ids([*context, choice]), digest_size=4).digest()
    return FIRST + int.from_bytes(digest, "little") % (LAST - FIRST)


def expected(prompt: Sequence[int], count: int, choice: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, choice))
    return tokens[len(prompt) :]


def logprob(context: int) -> float:
    """What the chain says of a token behind so many others."""
    return -context / 1000


class ChainFerry:
    """A page travels as the tokens that it holds."""

    page_kind = "chain"
    portion, ahead = 16, 2

    def __init__(self, slots: dict[int, list[int]], block_size: int) -> None:
        self._slots = slots
        self.page_bytes = len(pack_ids([0] * block_size))

    def make_room(self) -> None:
        """There is nothing to bring it through."""

    def follow(self) -> None:
        """All that is started is over when the device's thread is free."""

    def export(self, blocks: Sequence[int]) -> tuple[list[bytes], list[int]]:
        pages = [pack_ids(self._slots[block]) for block in blocks]
        return pages, [checksum(page) for page in pages]

    def bring(self, memory: memoryview, places: Sequence[int], blocks: Sequence[int]) -> Landed:
        for block, place in zip(blocks, places, strict=True):
            self._slots[block] = list(unpack_ids(bytes(memory[place : place + self.page_bytes])))
        return Landed(self.export(blocks)[1])

    def pin(self, memory: memoryview) -> bool:
        time.sleep(float(os.environ.get("CHAIN_PIN_S", "0")))
        return False

    def unpin(self, memory: memoryview) -> None:
        pass


class ChainDevice:
    """Pages that hold the tokens themselves. `step_s` makes a step take time, as a model would.

    It works one plan ahead, as a GPU does.
    """

    blocks = BLOCKS

    def __init__(self, block_size: int, step_s: float, limits: Limits) -> None:
        self.limits = limits
        self._size, self._step_s = block_size, step_s
        self._slots: dict[int, list[int]] = {}
        self.ferry = ChainFerry(self._slots, block_size)
        self._newest: dict[int, int] = {}  # the token drawn last, by the sequence's slot
        self._answers: deque[list[Sampled]] = deque()
        self._pieces = PIECES

    def prepare(self) -> bool:
        assert not self._answers, "a plan is under way"
        self._pieces -= 1
        return self._pieces > 0

    def run(self, plan: Plan) -> list[Sampled] | None:
        if plan.rows:
            with trace.span("device", "step", work=plan.work):
                self._answers.append(self._compute(plan))
        return self._answers.popleft() if len(self._answers) > 1 or not plan.rows else None

    def _compute(self, plan: Plan) -> list[Sampled]:
        if self._step_s:
            time.sleep(self._step_s)
        copied = [self._slots[source // self._size][source % self._size] for source, _ in plan.copies]
        for (_, target), token in zip(plan.copies, copied, strict=True):
            self._page(target // self._size)[target % self._size] = token
        for row in plan.rows:
            self._hurt(row.tokens)
            for at, token in enumerate(row.tokens, start=row.start):
                page = self._page(row.blocks[at // self._size])
                page[at % self._size] = self._newest[row.slot] if token == PENDING else token
        sampled = [self._draw(self._context(plan, draw.row), draw) for draw in plan.draws]
        self._newest |= {draw.slot: drawn.token for draw, drawn in zip(plan.draws, sampled, strict=True)}
        return sampled

    def _page(self, block: int) -> list[int]:
        return self._slots.setdefault(block, [0] * self._size)

    def _hurt(self, tokens: Sequence[int]) -> None:
        if KILLS in tokens:
            os._exit(9)
        if STARVES in tokens:
            raise MemoryError("no page could be had")

    def _draw(self, context: Sequence[int], draw: Draw) -> Sampled:
        if BREAKS in context:
            return Sampled(-1)
        token = next_token(context, draw.choice)
        asked = draw.sampling.logprobs
        return Sampled(token, None if asked is None else (logprob(len(context)), ((token, logprob(len(context))),)[:asked]))

    def _context(self, plan: Plan, at: int) -> list[int]:
        row = plan.rows[at]
        first = (row.end - 1) // self._size if LAST_PAGE_ONLY else 0
        return [token for block in row.blocks[first:] for token in self._slots[block]][: row.end - first * self._size]


def chain_device(config: EngineConfig) -> ChainDevice:
    limits = LIMITS.over(config.max_running, config.token_budget, config.prefill_budget)
    return ChainDevice(config.block_size, float(os.environ.get("CHAIN_STEP_S", "0")), limits)


if __name__ == "__main__":
    run("engine", EngineConfig, partial(main, build=chain_device))
