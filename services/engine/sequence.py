"""One choice of one request, as data: its tokens, its pages, and three lengths in order.

    cached <= computed <= total <= limit

`cached` were found computed at admission, `computed` have keys and values in pages, `total` are known (prompt and output).
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
    running: bool = False  # holds pages and takes part in steps; else it waits, or has left
    cached: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    published: int = 0  # blocks of ours that the pool has heard of
    finish: FinishReason | None = None
    broken: bool = False  # the model gave no usable logits

    @property
    def total(self) -> int:
        return len(self.tokens)

    @property
    def owed(self) -> int:
        """Tokens still to compute before the next one can be drawn."""
        return self.total - self.computed

    @property
    def output_length(self) -> int:
        return self.total - self.prompt_length

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def done(self) -> bool:
        return self.finish is not None or self.broken

    @property
    def penalized(self) -> bool:
        sampling = self.sampling
        return bool(sampling.frequency_penalty or sampling.presence_penalty) or sampling.repetition_penalty != 1.0

    def append(self, token: int) -> None:
        """Take one drawn token, and notice the end."""
        self.tokens.append(token)
        if token in self.sampling.stop_ids and self.output_length >= self.sampling.min_tokens:
            self.finish = "stop"
        elif self.total >= self.limit:
            self.finish = "length"

    def check(self) -> None:
        assert self.cached <= self.computed <= self.total <= self.limit, (self.cached, self.computed, self.total, self.limit)
