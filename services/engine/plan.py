"""What one engine step will do: plain data between policy (schedule) and device (forward). Pure, frozen, broadcastable.

Rows, draws and their answers are made anew for every sequence in every step, so they are tuples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from shared.messages import Logprob, Sampling
from shared.page import Buffer

PENDING = -1  # a token that is drawn but not told yet: the device has it


class Row(NamedTuple):
    """One sequence's share of a merge step: `tokens` at places `start` onward, over the blocks of its block table.

    A decode row has one token, which may be PENDING: the newest one drawn for `slot`. A prefill row has a chunk of known
    ones. `blocks` covers places 0 to start + len(tokens) - 1, or more; the first `told` of them are as in the slot's last row.
    A token attends to all places up to its own; its `positions` are how it is turned (none: they are the places).
    """

    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    slot: int = 0
    told: int = 0
    positions: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Draw(NamedTuple):
    """One token to sample, from the logits of the last position of row `row`; several draws may share a row (n > 1).

    `slot` is the drawing sequence's place, from 0, which it keeps while it runs. `position` counts output tokens, so noise
    is keyed by (sampling.seed, choice, position) whatever engine draws. `begins` marks the first draw of a slot's sequence:
    then, where a penalty needs them, `prompt` and `output` are the tokens so far; from there on the device remembers what it
    draws. `allow_stop` is False while fewer than min_tokens tokens are out: stop ids are then masked.
    """

    row: int
    choice: int
    position: int
    sampling: Sampling
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    allow_stop: bool
    slot: int = 0
    begins: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """Decode rows come first, prefill chunks after. `copies` (source slot, target slot) of a token each precede the forward,
    and all are read before one is written; slot: block * block_size + offset.
    """

    rows: tuple[Row, ...]
    draws: tuple[Draw, ...]
    copies: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def work(self) -> tuple[int, int]:
        """Decode rows, and prefill tokens."""
        decodes = sum(len(row.tokens) == 1 for row in self.rows)
        return decodes, self.tokens - decodes


class Sampled(NamedTuple):
    """The answer to one draw. `logprob` is None unless the draw's sampling asks for it."""

    token: int
    logprob: Logprob | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a device takes at once: running sequences; tokens of a step in which somebody decodes, and of one in which
    nobody waits for a token.
    """

    max_running: int
    token_budget: int
    prefill_budget: int

    def over(self, max_running: int, token_budget: int, prefill_budget: int) -> "Limits":
        """These, but for what is given (0 is not given)."""
        budget = token_budget or self.token_budget
        return Limits(max_running or self.max_running, budget, max(prefill_budget or self.prefill_budget, budget))


class Cargo(Protocol):
    """Pages on their way into a device."""

    def sums(self) -> Sequence[int]:
        """Waits until all are in their blocks. The checksums of what is there now."""
        ...


class Landed(NamedTuple):
    """A cargo that was there at once."""

    found: Sequence[int]

    def sums(self) -> Sequence[int]:
        return self.found


class Ferry(Protocol):
    """Brings pages out of a device and into it, beside the plans that run. Called from any thread, but for `follow`.

    The checksums are the ferry's own: a page is summed where it lies in the device, so that whatever happens to it on its way
    between two devices shows.
    """

    portion: int  # pages to bring or export at once, at most
    ahead: int  # cargoes that may be on their way at once

    @property
    def page_bytes(self) -> int:
        """Keys and values of one block."""
        ...

    @property
    def page_kind(self) -> str:
        """What shapes these bytes and their sums, beside the model and the block size."""
        ...

    def make_room(self) -> None:
        """Called before the others, to take the memory that they need: a step might have to wait for that. Spoils block 0."""
        ...

    def follow(self) -> None:
        """Called from the device's thread: what is asked for from now on comes after all plans that were started before."""
        ...

    def export(self, blocks: Sequence[int]) -> tuple[Sequence[Buffer], Sequence[int]]:
        """Copies of a portion of full blocks that are in use, `page_bytes` each, and their checksums: until the next export."""
        ...

    def bring(self, memory: memoryview, places: Sequence[int], blocks: Sequence[int]) -> Cargo:
        """Fill blocks that nobody else looks at with what `export` gave: `page_bytes` each, at these places of a memory, which
        must stay as it is until the cargo is there. `places` are best neighbours in slots of a prefix cache.
        """
        ...

    def pin(self, memory: memoryview) -> bool:
        """Pages will come from this memory: a GPU copies from it by itself once it is locked. False: it copies slower."""
        ...

    def unpin(self, memory: memoryview) -> None:
        """They will no more. Only after a pin that was True."""
        ...


class Device(Protocol):
    """What runs plans, in order. Called from one thread; `blocks` is the size of its page pool, block 0 included."""

    blocks: int
    limits: Limits

    @property
    def ferry(self) -> Ferry: ...

    def run(self, plan: Plan) -> list[Sampled] | None:
        """Start a plan. Returns the answers, one per draw in order, to the oldest plan that has none yet.

        A device that works ahead returns None while it may be given one more plan before those answers are needed; a plan
        without rows starts nothing and always waits for the oldest answers.
        """
        ...

    def prepare(self) -> bool:
        """One piece, of some milliseconds, of what makes later plans faster; no plan is under way. False: nothing is left."""
        ...
