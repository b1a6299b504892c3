"""What one engine step will do: plain data between policy (schedule) and device (forward). Pure, frozen, broadcastable."""

from dataclasses import dataclass
from typing import Protocol

from shared.messages import Logprob, Sampling


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a merge step: `tokens` at positions `start` onward, over the blocks of its block table.

    A decode row has one token; a prefill row a chunk of them. `blocks` covers positions 0 to start + len(tokens) - 1.
    """

    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to sample, from the logits of the last position of row `row`; several draws may share a row (n > 1).

    `position` counts output tokens, so noise is keyed by (sampling.seed, choice, position) whatever engine draws.
    `prompt` and `output` are the tokens so far where a penalty needs them, else empty. `allow_stop` is False while fewer
    than min_tokens tokens are out: stop ids are then masked.
    """

    row: int
    choice: int
    position: int
    sampling: Sampling
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    allow_stop: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Decode rows come first, prefill chunks after. `copies` (source block, target block) precede the forward."""

    rows: tuple[Row, ...]
    draws: tuple[Draw, ...]
    copies: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The answer to one draw. `logprob` is None unless the draw's sampling asks for it."""

    token: int
    logprob: Logprob | None = None


class Device(Protocol):
    """What runs plans. Called from one thread; `blocks` is the size of its page pool, block 0 included."""

    blocks: int

    def run(self, plan: Plan) -> list[Sampled]:
        """One answer per draw, in order."""
        ...
