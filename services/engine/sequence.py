"""One choice of one request, as data: its tokens, its pages, and three lengths in order.

    cached <= computed <= total <= limit

`cached` were found computed at admission, `computed` have keys and values in pages (or will, when the plans in flight have
run), `total` are prompt and output. The last `pending` of these are drawn in plans in flight: nobody here knows them yet.

Tokens are counted by places. Where the prompt has `parts` (services.engine.parts), their places come first and are found
computed, and `runs` say at which positions all the others stand.
"""

from dataclasses import dataclass, field, replace

from services.engine.parts import Part, Runs
from shared.messages import FinishReason, Sampling


@dataclass(slots=True, eq=False)
class Sequence:
    request: str
    choice: int
    tokens: list[int]
    prompt_length: int
    limit: int
    sampling: Sampling
    hashes: list[bytes]  # of the full blocks of `tokens`, as far as they are known
    root: bytes  # parent of the hash of the first block that is not a part's
    parts: tuple[Part, ...] = ()
    runs: Runs = ()
    apart: bool = False  # it is a part itself: once computed, it has done what it is for
    unforked: int = 0  # choices that start as copies of this one, once its prompt is computed
    arrival: int = 0
    running: bool = False  # holds pages and a slot, and takes part in steps; else it waits, or has left
    slot: int = -1  # its place on the device while it runs
    told: int = 0  # blocks that the device has been told of: those of `table`, unless some were replaced
    table: tuple[int, ...] = ()  # the blocks of the last row
    begun: bool = False  # a token has been drawn for it in this slot
    pending: int = 0
    cached: int = 0
    computed: int = 0
    made: int = 0  # of `cached`: parts that were computed because this sequence lacked them
    blocks: list[int] = field(default_factory=list)
    loose: list[int] = field(default_factory=list)  # slots of the parts' loose tokens, until these are copied
    lent: list[int] = field(default_factory=list)  # the blocks that they are in
    published: int = 0  # blocks of ours that the pool has heard of
    finish: FinishReason | None = None
    broken: bool = False  # the model gave no usable logits

    @property
    def total(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def owed(self) -> int:
        """Tokens still to compute before the next one can be drawn."""
        return self.total - self.computed

    @property
    def parted(self) -> int:
        """Tokens of the parts."""
        return sum(part.length for part in self.parts)

    @property
    def stem(self) -> int:
        """Blocks that it shares with its parts."""
        return sum(len(part.whole) for part in self.parts)

    @property
    def aside(self) -> int:
        """Blocks of its parts that it does not share."""
        return sum(len(part.hashes) for part in self.parts) - self.stem

    @property
    def parent(self) -> bytes:
        """Of the hash of the first block that has none."""
        return self.hashes[-1] if len(self.hashes) > self.stem else self.root

    @property
    def output_length(self) -> int:
        return self.total - self.prompt_length

    @property
    def certain_end(self) -> bool:
        """The last token it may have is drawn: nothing is left to compute."""
        return self.total >= self.limit

    @property
    def done(self) -> bool:
        return self.finish is not None or self.broken

    @property
    def penalized(self) -> bool:
        sampling = self.sampling
        return bool(sampling.frequency_penalty or sampling.presence_penalty) or sampling.repetition_penalty != 1.0

    def fork(self, choice: int, slot: int) -> "Sequence":
        """Another choice, which goes on from here over the same blocks."""
        tokens, hashes, blocks = list(self.tokens), list(self.hashes), list(self.blocks)
        return replace(self, choice=choice, slot=slot, tokens=tokens, hashes=hashes, blocks=blocks, unforked=0, told=0)

    def append(self, token: int) -> None:
        """Take the oldest pending token, and notice the end."""
        self.pending -= 1
        self.tokens.append(token)
        if token in self.sampling.stop_ids and len(self.tokens) - self.prompt_length >= self.sampling.min_tokens:
            self.finish = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish = "length"

    def check(self) -> None:
        assert self.cached <= self.computed <= self.total <= self.limit, (self.cached, self.computed, self.total, self.limit)
