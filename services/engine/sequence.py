"""One choice of one request, as data: its tokens, its pages, and three lengths in order.

    cached <= computed <= total <= limit

`cached` were found computed at admission, `computed` have keys and values in pages (or will, when the plans in flight have
run), `total` are prompt and output. The last `pending` of these are drawn in plans in flight: nobody here knows them yet.
"""

from dataclasses import dataclass, field

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
    root: bytes  # parent of the first block's hash
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
    blocks: list[int] = field(default_factory=list)
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
