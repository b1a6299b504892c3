"""Where the texts and tokens of a prompt stand whose modules are computed apart from each other."""

from typing import Annotated

from pydantic import Field

from shared.fields import Count
from shared.wire import Wire

MAX_PARTS = 512  # of a prompt
MAX_RUNS = 1 << 14  # of a part, or behind all parts

Run = tuple[Count, Annotated[int, Field(ge=1)]]  # tokens that stand one behind the other: the first position, and how many
Runs = Annotated[tuple[Run, ...], Field(max_length=MAX_RUNS)]
Segment = tuple[Count, str]  # a text, and its first token's position from the start of its prompt schema
Segments = Annotated[tuple[Segment, ...], Field(max_length=MAX_RUNS)]


class Layout(Wire):
    """What a prompt schema puts where the prompt has the `mark`. Each of `parts` is computed apart from all the others (a
    module, or those of a scaffold); `arguments` see all of them; whatever follows begins at the position `end`.
    """

    mark: Annotated[str, Field(min_length=1, max_length=64)]
    parts: Annotated[tuple[Segments, ...], Field(max_length=MAX_PARTS)]
    arguments: Segments
    end: Count


class Placement(Wire):
    """At which positions a prompt's tokens stand, end to end: the first `head` where they are; those of each of `parts`, which
    see the head and nothing of the other parts; then the rest's, which see all before them, and behind these the output.
    """

    head: Count
    parts: Annotated[tuple[Runs, ...], Field(max_length=MAX_PARTS)]
    rest: Annotated[Runs, Field(min_length=1)]

    @property
    def tokens(self) -> int:
        return self.head + sum(count for runs in (*self.parts, self.rest) for _, count in runs)

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return sum(self.rest[-1])
