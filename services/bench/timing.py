"""What one streamed answer tells: the meter takes server-sent events as they arrive, the timing is its result. Pure."""

from dataclasses import dataclass

import orjson

MAX_LINE = 1 << 20
DETAIL = 200  # characters of an error that are kept


class StreamFailed(Exception):
    """The server broke the stream's form or reported an error inside it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail[:DETAIL]


@dataclass(frozen=True, slots=True)
class Timing:
    """One request. Seconds; `start` counts from the run's start, `late` is how much after its due time it was sent."""

    index: int
    start: float
    late: float = 0.0
    status: int = 0  # of HTTP; 0: no answer
    failure: str | None = None  # the kind; None: a whole answer
    detail: str = ""
    ttft: float | None = None
    latency: float | None = None  # until the last token
    stall: float = 0.0  # longest gap between two chunks of tokens
    chunks: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; an answer of one token has none."""
        if self.ttft is None or self.latency is None or self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)

    @property
    def end(self) -> float:
        return self.start + (self.latency or 0.0)


def _count(usage: dict[str, object], key: str) -> int:
    value = usage.get(key)
    return value if isinstance(value, int) else 0


class Meter:
    """Counts and times the tokens of one answer. Feed it the body as it arrives."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.stall = 0.0
        self.chunks = 0
        self.finished = False
        self.input_tokens = 0
        self.usage_tokens: int | None = None
        self._rest = b""

    @property
    def output_tokens(self) -> int:
        """The server's own count where it gives one: a chunk may carry several tokens, or none."""
        return self.chunks if self.usage_tokens is None else self.usage_tokens

    def feed(self, data: bytes, now: float) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE:
            raise StreamFailed("malformed stream", "a line without end")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:], now)

    def _event(self, data: bytes, now: float) -> None:
        if data.strip() == b"[DONE]":
            self.finished = True
            return
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise StreamFailed("malformed stream", str(error)) from error
        if not isinstance(event, dict):
            raise StreamFailed("malformed stream", "an event that is no object")
        if event.get("error"):
            raise StreamFailed("error in stream", orjson.dumps(event["error"]).decode())
        usage, choices = event.get("usage"), event.get("choices")
        if isinstance(usage, dict):
            self.input_tokens = _count(usage, "prompt_tokens")
            self.usage_tokens = _count(usage, "completion_tokens")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._choice(choice, now)

    def _choice(self, choice: dict[str, object], now: float) -> None:
        """A chunk is a token when it has text, or is neither the opening role nor the finish: some have no text."""
        delta = choice.get("delta")
        fields = delta if isinstance(delta, dict) else choice
        finish = choice.get("finish_reason") is not None
        if fields.get("content") or fields.get("text") or not (finish or "role" in fields):
            self.chunks += 1
            if self.first is None:
                self.first = now
            elif self.last is not None:
                self.stall = max(self.stall, now - self.last)
            self.last = now
        elif finish:
            self.last = now
        self.finished = self.finished or finish

    def timing(self, index: int, start: float, late: float, origin: float) -> Timing:
        """The whole answer, if it was one. `start`, `origin` (the run's start) and the times fed are of one clock."""
        if not self.finished:
            raise StreamFailed("cut short", f"after {self.chunks} chunks")
        if self.last is None or not self.output_tokens:
            raise StreamFailed("empty answer")
        return Timing(
            index, start - origin, late, 200, None, "",
            ttft=(self.first or self.last) - start,
            latency=self.last - start,
            stall=self.stall, chunks=self.chunks,
            input_tokens=self.input_tokens, output_tokens=self.output_tokens,
        )  # fmt: skip
