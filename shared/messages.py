"""Every message on any wire, and the stream each one travels on.

A message is a frozen pydantic model, strict about types, lengths and ranges; `shared.codec` packs and reads them.
Token ids travel as packed little-endian int32 (`pack_ids`); KV bytes never travel here.
"""

from typing import Annotated, Literal, TypedDict

from pydantic import Field, model_validator

from shared.fields import (
    MAX_CHAT_MESSAGES,
    MAX_CHOICES,
    Bias,
    ChoiceIndex,
    Choices,
    Count,
    EntryId,
    Epoch,
    Given,
    Ids,
    Logprobs,
    MinP,
    Partition,
    Penalty,
    RepetitionPenalty,
    RequestId,
    Seed,
    Temperature,
    Tenant,
    TokenId,
    TopK,
    TopP,
)
from shared.layout import Layout, Placement
from shared.wire import Wire


class Sampling(Wire):
    """How to draw tokens. `temperature` 0 is greedy; `top_k` 0 is no limit; `logprobs` None computes none."""

    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[tuple[tuple[TokenId, Bias], ...], Field(max_length=300)] = ()
    seed: Seed = 0
    n: Choices = 1
    logprobs: Logprobs | None = None
    min_tokens: Count = 0
    stop_ids: Annotated[tuple[TokenId, ...], Field(max_length=64)] = ()
    ignore_eos: bool = False


class ChatMessage(Wire):
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str


ChatMessages = Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=MAX_CHAT_MESSAGES)]


FinishReason = Literal["stop", "length", "cancelled"]


class End(Wire):
    """The choice is complete after `count` tokens. Times are what each stage took, in milliseconds."""

    request: RequestId
    epoch: Epoch
    choice: ChoiceIndex
    count: Count
    reason: FinishReason
    cached_tokens: Count
    tokenize_ms: float
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    kind: Literal["end"] = "end"


Ends = Annotated[tuple[End | None, ...], Field(max_length=MAX_CHOICES)]  # per choice, where it was complete already


class Submit(Wire):
    """A request on its way to a tokenizer. `prompt` is a chat, a text, or packed token ids.

    `generation`, `given`, `ends` and `log_from` are where the token log of this attempt starts: see `shared.tokenlog`.
    `deadline_ms` is wall-clock time; `max_tokens` None means all that the context holds.
    """

    request: RequestId
    tenant: Tenant
    partition: Partition
    log_from: EntryId
    generation: Count
    given: Given
    ends: Ends
    prompt: ChatMessages | str | Ids
    sampling: Sampling
    max_tokens: Annotated[int, Field(ge=1)] | None
    deadline_ms: Count
    layout: Layout | None = None
    kind: Literal["submit"] = "submit"


class Work(Wire):
    """A tokenized request for an engine. `blocks` are the concatenated 16-byte hashes of the prompt's full blocks.

    `resume`: an engine had it before, so its output so far must be read from the log. `tries` counts engines lost with it.

    Where `placement` fixes positions, names of blocks depend on how parts are packed: the engine finds them.
    """

    request: RequestId
    tenant: Tenant
    partition: Partition
    log_from: EntryId
    generation: Count
    given: Given
    ends: Ends
    prompt: Ids
    root: Annotated[bytes, Field(min_length=16, max_length=16)]  # parent of the first block's hash
    blocks: bytes
    sampling: Sampling
    max_tokens: Annotated[int, Field(ge=1)]
    deadline_ms: Count
    tokenize_ms: float
    placement: Placement | None = None
    resume: bool = False
    tries: Count = 0
    kind: Literal["work"] = "work"

    @model_validator(mode="after")
    def _all_are_placed(self) -> "Work":
        if self.placement is not None and 4 * self.placement.tokens != len(self.prompt):
            raise ValueError("a placement of more or less tokens than the prompt has")
        return self


class Claim(Wire):
    """An engine has taken the request: from here on only this epoch's tokens count."""

    request: RequestId
    epoch: Epoch
    prompt_tokens: Count
    kind: Literal["claim"] = "claim"


Logprob = tuple[float, tuple[tuple[TokenId, float], ...]]  # the drawn token's, and the top alternatives'


class Tokens(Wire):
    """`ids` follow the first `first` tokens of the choice, whose hash is `digest` (`tokenlog.digest`)."""

    request: RequestId
    epoch: Epoch
    choice: ChoiceIndex
    first: Count
    digest: Annotated[bytes, Field(min_length=8, max_length=8)]
    ids: Ids
    logprobs: tuple[Logprob, ...] | None = None
    kind: Literal["tokens"] = "tokens"


class TokensFields(TypedDict):
    """A `Tokens` record as the wire has it, for who writes a hundred thousand a second: readers validate, writers need not."""

    request: str
    epoch: Epoch
    choice: int
    first: int
    digest: bytes
    ids: bytes
    logprobs: "tuple[Logprob, ...] | None"
    kind: Literal["tokens"]


ErrorCode = Literal[
    "prompt_too_long", "bad_prompt", "deadline_exceeded", "engine_crash", "cancelled", "stream_lost", "superseded", "overloaded"
]


class Fail(Wire):
    """The whole request ends with an error."""

    request: RequestId
    epoch: Epoch
    code: ErrorCode
    text: str
    kind: Literal["fail"] = "fail"


class Attach(Wire):
    """A streamer serves the request's client on this connection now; those with a lower number stop."""

    request: RequestId
    connection: Count
    kind: Literal["attach"] = "attach"


LogRecord = Annotated[Claim | Tokens | End | Fail | Attach, Field(discriminator="kind")]


class Step(Wire):
    """One entry of the token log: all that one engine step has to say to one partition."""

    records: Annotated[tuple[LogRecord, ...], Field(max_length=65536)]
    kind: Literal["step"] = "step"


class Cancel(Wire):
    """Stop a request (or one choice of it) in every attempt up to `generation`."""

    request: RequestId
    generation: Count
    choice: ChoiceIndex | None = None
    kind: Literal["cancel"] = "cancel"


class Record(Wire):
    """`req:{id}`: what any streamer needs to serve the request's client. `submit` holds the newest attempt's start."""

    submit: Submit
    stop: Annotated[tuple[str, ...], Field(max_length=16)]
    connection: Count
    kind: Literal["record"] = "record"


class Histogram(Wire):
    """Cumulative counts per upper bound, as Prometheus has them; the last bound is infinity."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Beat(Wire):
    """One process, as it shows itself to the mesh each second."""

    stage: str
    id: str
    pid: Count
    host: str
    ready: bool
    detail: str
    counters: dict[str, float]
    gauges: dict[str, float]
    histograms: dict[str, Histogram]
    kind: Literal["beat"] = "beat"


Message = Submit | Work | Step | Cancel | Record | Beat
