"""The token log's rules: records in, decisions out. Pure; engines and streamers run exactly this.

The order of the log decides everything. A claim counts if its epoch is higher than the current one; tokens and ends count
only under the current epoch; an overlap equal to what was read is dropped; a gap, a wrong hash or a wrong count is a
conflict, never skipped. So all readers of a request derive the same sequence, and a zombie's late records mean nothing.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from zlib import crc32

from shared.fields import Epoch, pack_ids, unpack_ids
from shared.messages import Claim, End, Fail, Logprob, LogRecord, Tokens

_CURSOR = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})*\.[0-9a-f]{8}")


class Verdict(Enum):
    NOTHING = "nothing"  # not for the current epoch, or nothing new in it
    NEWS = "news"
    CONFLICT = "conflict"  # the log cannot be followed from here: restore or walk away


def digest(packed: bytes) -> bytes:
    """The 8-byte hash of a whole sequence of packed token ids."""
    return hashlib.blake2b(packed, digest_size=8).digest()


def entry_epoch(generation: int, entry: str) -> Epoch:
    """The epoch of an attempt: the entry id is the one that the broker gave to its `work` message."""
    ms, _, seq = entry.partition("-")
    return generation, int(ms), int(seq)


@dataclass(slots=True)
class Choice:
    """One sequence of output tokens, as the log tells it. `hash` runs over all of `ids`."""

    ids: "array[int]" = field(default_factory=lambda: array("i"))
    logprobs: list[Logprob | None] = field(default_factory=list)  # one per id; None where the log does not tell
    end: End | None = None
    hash: "hashlib.blake2b" = field(default_factory=lambda: hashlib.blake2b(digest_size=8))
    latest: bytes = b""  # the digest of all of `ids`, once it was asked for: a cursor and the next record want the same one

    def extend(self, packed: bytes, logprobs: Sequence[Logprob] = ()) -> None:
        self.ids.extend(unpack_ids(packed))
        self.hash.update(packed)
        self.latest = b""
        self.logprobs += logprobs
        self.logprobs += [None] * (len(self.ids) - len(self.logprobs))

    def digest_at(self, count: int) -> bytes:
        if count != len(self.ids):
            return digest(pack_ids(self.ids[:count]))
        self.latest = self.latest or self.hash.digest()
        return self.latest


class Follower:
    """What one reader of the log knows of one request. The attempt started from `given` tokens, some choices complete."""

    def __init__(self, generation: int, choices: int, given: Sequence[bytes] = (), ends: Sequence[End | None] = ()) -> None:
        self.epoch: Epoch = (generation, 0, 0)
        self.choices = [Choice() for _ in range(choices)]
        self.failure: Fail | None = None
        self.prompt_tokens = 0
        self.fenced = 0  # tokens and ends of attempts that do not count (any more)
        self.fruitless = 0  # claims since the last token: attempts that ended before they could say anything
        for choice, packed in zip(self.choices, given, strict=False):
            choice.extend(packed)
        for choice, end in zip(self.choices, ends, strict=False):
            choice.end = end

    @property
    def ended(self) -> bool:
        return self.failure is not None or all(choice.end for choice in self.choices)

    @property
    def claimed(self) -> bool:
        return self.epoch[1:] != (0, 0)

    def inherit(self, before: "Follower") -> None:
        """Keep what an earlier attempt's log told beside the tokens that this one was given."""
        self.prompt_tokens, self.fenced = before.prompt_tokens, before.fenced
        for choice, known in zip(self.choices, before.choices, strict=False):
            choice.logprobs[: len(known.logprobs)] = known.logprobs[: len(choice.ids)]

    def continues(self, epoch: Epoch, records: Iterable[LogRecord]) -> bool:
        """Read a log up to one's own claim: whether the request is this attempt's to continue, after `choices`.

        Not where the log ends in a conflict, under a higher epoch, or complete.
        """
        if any(self.read(record) is Verdict.CONFLICT for record in records):
            return False
        return self.epoch == epoch and not self.ended

    def read(self, record: LogRecord) -> Verdict:
        """Take one record of this request, in log order."""
        if record.kind == "claim":
            return self._claim(record)
        if record.kind == "attach" or record.epoch != self.epoch:
            self.fenced += not self.ended
            return Verdict.NOTHING
        if record.kind == "fail":
            return self._fail(record)
        if record.choice >= len(self.choices):
            return Verdict.CONFLICT
        choice = self.choices[record.choice]
        if choice.end is not None or self.failure is not None:
            return Verdict.NOTHING
        return self._tokens(choice, record) if record.kind == "tokens" else self._end(choice, record)

    def _fail(self, record: Fail) -> Verdict:
        if self.ended:
            return Verdict.NOTHING
        self.failure = record
        return Verdict.NEWS

    def _claim(self, claim: Claim) -> Verdict:
        if self.ended or claim.epoch <= self.epoch:
            return Verdict.NOTHING
        self.epoch = claim.epoch
        self.fruitless += 1
        self.prompt_tokens = claim.prompt_tokens
        return Verdict.NEWS

    def _tokens(self, choice: Choice, record: Tokens) -> Verdict:
        have = len(choice.ids)
        if record.first > have or choice.digest_at(record.first) != record.digest:
            return Verdict.CONFLICT
        fresh = record.ids
        if record.first < have:  # told again, as after a take-over
            known = pack_ids(choice.ids[record.first :])
            if fresh[: len(known)] != known[: len(fresh)]:
                return Verdict.CONFLICT
            fresh = fresh[len(known) :]
        if not fresh:
            return Verdict.NOTHING
        self.fruitless = 0
        choice.extend(fresh, (record.logprobs or ())[have - record.first :])
        return Verdict.NEWS

    def _end(self, choice: Choice, record: End) -> Verdict:
        if record.count != len(choice.ids):
            return Verdict.CONFLICT
        choice.end = record
        return Verdict.NEWS


def cursor(choices: Sequence[Choice], counts: Sequence[int]) -> str:
    """The client's place in the stream: tokens per choice, and a hash over all of them. Opaque to clients."""
    return f"{'-'.join(map(str, counts))}.{_cursor_hash(choices, counts)}"


def newest(choices: Sequence[Choice]) -> str:
    """The cursor after all that the log tells."""
    return cursor(choices, [len(choice.ids) for choice in choices])


def _cursor_hash(choices: Sequence[Choice], counts: Sequence[int]) -> str:
    together = b"".join([choice.digest_at(count) for choice, count in zip(choices, counts, strict=True)])
    return f"{crc32(together):08x}"  # enough for what is random already; every frame has one


def counts_of(text: str, choices: int) -> list[int]:
    """The token counts of a cursor. Raises ValueError when it is not a cursor of that many choices."""
    if not _CURSOR.fullmatch(text) or text.count("-") + 1 != choices:
        raise ValueError("not a cursor of this request")
    return [int(number) for number in text.partition(".")[0].split("-")]


def agrees(text: str, choices: Sequence[Choice]) -> bool:
    """Whether a cursor (of `counts_of`'s form) names a place in the sequences that the log tells."""
    counts = counts_of(text, len(choices))
    if any(count > len(choice.ids) for count, choice in zip(counts, choices, strict=True)):
        return False
    return text.partition(".")[2] == _cursor_hash(choices, counts)
