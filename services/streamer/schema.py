"""Request bodies, as OpenAI has them plus the sampling fields that open servers share. Every number has its range.

Fields of OpenAI's API that mean nothing here (`user`, `metadata`, …) are accepted and ignored; those that would change the
answer but are not implemented are refused unless they have their default; all others are unknown, and refused.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from services.streamer.body import BadRequest, Body, Text, encodable, refusal
from services.streamer.prompt_modules import Use
from shared.fields import (
    MAX_CHAT_MESSAGES,
    Bias,
    Choices,
    Logprobs,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    Temperature,
    TokenId,
    TopP,
    pack_ids,
)
from shared.messages import ChatMessage, Sampling

MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_TOKENS = 1 << 20

_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class BodyMessage(Body):
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: Text | Annotated[list[TextPart], Field(max_length=256)]
    name: Annotated[str, Field(max_length=256)] | None = None

    def plain(self) -> ChatMessage:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role=self.role, content=encodable(content))


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Any = None


class TextFormat(Body):
    type: Literal["text"]


class Generation(Body):
    """What chat and completion requests share."""

    model: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None  # -1 and 0 are no limit
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=300)] | None = None
    seed: Seed | None = None
    n: Choices | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=32)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    prompt_schema: Use | None = None
    # Accepted and ignored.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def sampling(self, seed: int) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self._biases(),
            seed=seed if self.seed is None else self.seed,
            n=self.n or 1,
            logprobs=self.logprobs_wanted(),
            min_tokens=self.min_tokens,
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )

    def _biases(self) -> tuple[tuple[int, float], ...]:
        biases = (self.logit_bias or {}).items()
        wrong = next((name for name, _ in biases if not (name.isascii() and name.isdecimal() and len(name) < 10)), None)
        if wrong is not None:
            raise BadRequest(f"logit_bias: {wrong!r} is not a token id", "logit_bias")
        return tuple((int(name), bias) for name, bias in biases)

    def logprobs_wanted(self) -> int | None:
        raise NotImplementedError

    def prompt_wanted(self) -> tuple[ChatMessage, ...] | str | bytes:
        raise NotImplementedError

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def tokens_wanted(self) -> int | None:
        return self.max_tokens


class ChatBody(Generation):
    messages: Annotated[list[BodyMessage], Field(min_length=1, max_length=MAX_CHAT_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    # Only their defaults are implemented.
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Any = None
    verbosity: Any = None

    def prompt_wanted(self) -> tuple[ChatMessage, ...]:
        return tuple(message.plain() for message in self.messages)

    def logprobs_wanted(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def tokens_wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(Generation):
    prompt: Text | Annotated[list[TokenId], Field(min_length=1)] | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    # Only their defaults are implemented.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    def prompt_wanted(self) -> str | bytes:
        prompt = self.prompt[0] if isinstance(self.prompt, list) and isinstance(self.prompt[0], str) else self.prompt
        return encodable(prompt) if isinstance(prompt, str) else pack_ids(prompt)

    def logprobs_wanted(self) -> int | None:
        return self.logprobs

    def tokens_wanted(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default for completions


Id = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(encodable)]


class Generate(ChatBody):
    """WebSocket: a chat, or with `prompt` instead of messages a completion."""

    type: Literal["generate"]
    id: Id
    idempotency_key: str | None = None


class GeneratePrompt(CompletionBody):
    type: Literal["generate"]
    id: Id
    idempotency_key: str | None = None


class CancelFrame(Body):
    type: Literal["cancel"]
    id: Id


class ResumeFrame(Body):
    type: Literal["resume"]
    id: Id
    request: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    cursor: Annotated[str, Field(max_length=256)] = ""
    return_token_ids: bool = False


_FRAMES: dict[str, type[Body]] = {"generate": Generate, "cancel": CancelFrame, "resume": ResumeFrame}


def parse_frame(raw: str) -> Generate | GeneratePrompt | CancelFrame | ResumeFrame:
    """One WebSocket frame. Raises BadRequest."""
    try:
        fields = _OBJECT.validate_json(raw)
        kind = _FRAMES.get(str(fields.get("type")))
        if kind is None:
            raise BadRequest("type must be generate, cancel or resume", "type")
        if kind is Generate and "prompt" in fields:
            kind = GeneratePrompt
        frame: Any = kind.model_validate_json(raw)
    except ValidationError as error:
        raise refusal(error) from error
    return frame  # type: ignore[no-any-return]
