"""One client's request as this streamer serves it: the log's rules applied, turned into text, ready to be sent.

Only counts are kept for what was sent: a slow client costs the token ids of its own request and nothing more.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from services.streamer.decode import TextStream
from services.streamer.keys import ANYBODY
from shared import trace
from shared.bus import entry_order
from shared.fields import pack_ids
from shared.messages import End, ErrorCode, FinishReason, LogRecord, Record
from shared.tokenlog import Follower, Verdict, cursor
from shared.vocab import Vocab

MAX_DELTA_TOKENS = 64  # what a client that lags gets at once


class StreamError(Exception):
    """The request's one terminal event, when it is an error."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one choice for the client: tokens [first, count) and the text they made certain."""

    choice: int
    text: str
    first: int
    count: int
    finish: FinishReason | None


@dataclass(slots=True)
class Output:
    """How far one choice has been told to the client. `count` tokens, and then perhaps an end."""

    text: TextStream
    count: int = 0
    finish: FinishReason | None = None


@dataclass(slots=True)
class Clock:
    """When things happened here, by the monotonic clock."""

    opened: float = field(default_factory=time.monotonic)
    first: float = 0.0
    newest: float = 0.0

    def tick(self) -> None:
        self.newest = time.monotonic()
        self.first = self.first or self.newest


class Session:
    """`position` is the newest log entry that was applied; records up to it are ignored."""

    def __init__(self, record: Record, vocab: Vocab) -> None:
        self.vocab, self.clock = vocab, Clock()
        self.news = asyncio.Event()
        self.conflict = False
        self.stopped = False
        self.restoring = False
        self.error: StreamError | None = None
        self.heard = time.monotonic()
        self.key = ANYBODY
        self.skipped: int | None = None  # tokens that an earlier connection was told; None: there was none
        self.outputs = [Output(TextStream(vocab.tokenizer, record.stop)) for _ in range(record.submit.sampling.n)]
        self.held: list[tuple[str, LogRecord]] = []  # told while a restore was under way: the new attempt's may be among them
        self.follower = Follower(0, 0)
        self.begin(record)

    def begin(self, record: Record) -> None:
        """Follow the attempt that this record describes. What was told to the client stays told."""
        submit, before = record.submit, self.follower
        self.record, self.position = record, submit.log_from
        self.follower = Follower(submit.generation, submit.sampling.n, submit.given, submit.ends)
        self.follower.inherit(before)
        self.conflict, self.heard = False, time.monotonic()
        held, self.held = self.held, []
        for entry, told in held:
            self.apply(entry, told)

    @property
    def id(self) -> str:
        return self.record.submit.request

    @property
    def partition(self) -> str:
        return self.record.submit.partition

    @property
    def done(self) -> bool:
        return self.stopped or self.error is not None or self.complete

    @property
    def complete(self) -> bool:
        """The client has the whole answer; engines may not know yet, where a stop string ended it."""
        return all(output.finish for output in self.outputs)

    @property
    def superseded(self) -> bool:
        return self.error is not None and self.error.code == "superseded"

    def apply(self, entry: str, record: LogRecord) -> None:
        """Take one record of the log, in order."""
        if record.kind == "attach":
            if record.connection > self.record.connection:
                self.fail("superseded", "another connection serves this request now")
            return
        if self.conflict:
            if self.restoring:
                self.held.append((entry, record))
            return
        if entry_order(entry) <= entry_order(self.position):
            return
        verdict = self.follower.read(record)
        if verdict is Verdict.NOTHING:
            return
        self.heard = time.monotonic()
        failure = self.follower.failure
        # Whoever cancels removes the record and listens no more: this was an older attempt's, of before the broker lost data.
        self.conflict = verdict is Verdict.CONFLICT or (failure is not None and failure.code == "cancelled")
        if failure is not None and not self.conflict:
            self.fail(failure.code, failure.text)
        self.news.set()

    def fail(self, code: ErrorCode, text: str) -> None:
        self.error = self.error or StreamError(code, text)
        self.news.set()

    def stop(self) -> None:
        """The client wants no more: what it was told is the answer."""
        self.stopped = True
        self.news.set()

    # -- towards the client ----------------------------------------------------------------------------------------

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """News as it comes, until every choice has finished. Raises StreamError."""
        while not self.done:
            await self.news.wait()
            self.news.clear()
            while not self.stopped and (fresh := self._detokenize()):
                yield fresh
        if self.error is not None:  # it may have come before anybody asked
            raise self.error

    def _detokenize(self) -> list[Delta]:
        with trace.span("streamer", "detokenize", self.id):
            return self._advance()

    def _advance(self) -> list[Delta]:
        fresh = [delta for choice in range(len(self.outputs)) if (delta := self._advance_choice(choice)) is not None]
        if any(delta.count for delta in fresh):
            self.clock.tick()
        return fresh

    def _advance_choice(self, choice: int) -> Delta | None:
        output, told = self.outputs[choice], self.follower.choices[choice]
        if output.finish is not None:
            return None
        first, pieces = output.count, []
        for id in told.ids[first : first + MAX_DELTA_TOKENS]:
            pieces.append(output.text.push(id))
            output.count += 1
            if output.text.stopped:
                output.finish = "stop"
                break
        if output.finish is None and told.end is not None and output.count == len(told.ids):
            pieces.append(output.text.finish())
            output.finish = "stop" if output.text.stopped else told.end.reason
        if output.count == first and output.finish is None:
            return None
        return Delta(choice, "".join(pieces), first, output.count, output.finish)

    def skip(self, counts: list[int]) -> None:
        """The client has these tokens' text already (it came back with a cursor): derive it again, and tell nothing."""
        self.skipped = sum(counts)
        for output, told, count in zip(self.outputs, self.follower.choices, counts, strict=True):
            for id in told.ids[:count]:
                output.text.push(id)
            output.count = count

    @property
    def counts(self) -> list[int]:
        return [output.count for output in self.outputs]

    def cursor(self) -> str:
        return cursor(self.follower.choices, self.counts)

    def frames(self, deltas: list[Delta]) -> Iterator[tuple[Delta, str]]:
        """Each with the cursor of a client that got the deltas up to it, and not the ones that follow."""
        counts = self.counts
        for delta in deltas:
            counts[delta.choice] = delta.first
        for delta in deltas:
            counts[delta.choice] = delta.count
            yield delta, cursor(self.follower.choices, counts)

    @property
    def fresh_tokens(self) -> int:
        """What this connection used: the output it was told, and the prompt unless an earlier one has answered for it."""
        told = sum(self.counts)
        return told + self.follower.prompt_tokens if self.skipped is None else told - self.skipped

    def known(self) -> tuple[tuple[bytes, ...], tuple[End | None, ...]]:
        """What the client has or is about to get: above the log and every engine's memory when the broker has lost data."""
        told = list(zip(self.outputs, self.follower.choices, strict=True))
        given = tuple(pack_ids(choice.ids[: output.count] if output.finish else choice.ids) for output, choice in told)
        return given, tuple(self._end(at) for at in range(len(told)))

    def _end(self, choice: int) -> End | None:
        output, told = self.outputs[choice], self.follower.choices[choice]
        if told.end is not None or output.finish is None:
            return told.end
        return End(
            request=self.id, epoch=self.follower.epoch, choice=choice, count=output.count, reason=output.finish,
            cached_tokens=0, tokenize_ms=0.0, queue_ms=0.0, prefill_ms=0.0, decode_ms=0.0,
        )  # fmt: skip

    def usage(self) -> dict[str, object]:
        prompt, completion = self.follower.prompt_tokens, sum(self.counts)
        cached = max((choice.end.cached_tokens for choice in self.follower.choices if choice.end), default=0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def timings(self) -> dict[str, float]:
        """What each stage took, in milliseconds, and what the client saw from this streamer."""
        ends = [choice.end for choice in self.follower.choices if choice.end]
        stages = {
            name: round(max((getattr(end, name) for end in ends), default=0.0), 3)
            for name in ("tokenize_ms", "queue_ms", "prefill_ms", "decode_ms")
        }
        clock = self.clock
        seen = {"ttft_ms": clock.first - clock.opened, "total_ms": (clock.newest or clock.opened) - clock.opened}
        return stages | {name: round(max(1000 * value, 0.0), 3) for name, value in seen.items()}
