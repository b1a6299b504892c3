"""Token ids → text, incrementally. Pure: text is a function of tokens[0..k), whatever the chunking.

A character whose bytes are not complete yet is held back, and so is text that may turn out to be the start of a stop string.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one choice as it grows. `stopped`: a stop string was found, and no token after it counts."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = 0  # characters that the decoder has given
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False

    def push(self, id: int) -> str:
        """The text that one more token makes certain."""
        self._ids.append(id)
        return self._pass(self._decoder.step(self._tokenizer, id) or "")

    def finish(self) -> str:
        """What was held back: no token follows. A character that was cut off in the middle is not told at all."""
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._emitted :]
        text = self._pass(rest.rstrip("\ufffd"))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _pass(self, text: str) -> str:
        self._emitted += len(text)
        if not self._stop:
            return text
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a proper start of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
