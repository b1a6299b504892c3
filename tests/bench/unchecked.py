"""A stage without the token log's checks, to measure what they cost: python -m tests.bench.unchecked services.streamer

Nothing is hashed (not for the log, not for cursors), and a reader takes every record as it comes.
"""

import runpy
import sys
from types import SimpleNamespace

from shared import tokenlog
from shared.messages import Claim, End, Fail, LogRecord, Tokens
from shared.tokenlog import Follower, Verdict


class NoHash:
    def __init__(self, data: bytes = b"", *, digest_size: int) -> None:
        self._size = digest_size

    def update(self, data: bytes) -> None:
        pass

    def digest(self) -> bytes:
        return bytes(self._size)

    def hexdigest(self) -> str:
        return "00" * self._size


def read(self: Follower, record: LogRecord) -> Verdict:
    if isinstance(record, Tokens):
        self.choices[record.choice].extend(record.ids, record.logprobs or ())
    elif isinstance(record, End):
        self.choices[record.choice].end = record
    elif isinstance(record, Fail):
        self.failure = record
    elif isinstance(record, Claim):
        self.epoch, self.prompt_tokens = record.epoch, record.prompt_tokens
    return Verdict.NEWS


if __name__ == "__main__":
    tokenlog.hashlib = SimpleNamespace(blake2b=NoHash)  # type: ignore[assignment]
    Follower.read = read  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
