"""What engines and prefix caches say to each other: one msgpack message a frame, pages as raw bytes behind it.

A conversation is one connection. The engine speaks and the cache answers, in order; `Release` and `Spoiled` have no answer.
Leases belong to their connection: when it ends, so do they. Pages and hashes travel in chain order, from the root.
"""

from typing import Annotated, Literal

from pydantic import Field

from shared.blocks import HASH_BYTES
from shared.fields import Count
from shared.wire import Wire

MAX_BLOCKS = 1 << 16  # of one chain
MAX_WRITE = 256  # pages that one connection may be writing: what a hung engine can withhold from others
FRAME_HEAD_BYTES = 4

Hashes = Annotated[bytes, Field(max_length=MAX_BLOCKS * HASH_BYTES)]  # concatenated
Space = Annotated[bytes, Field(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Slots = Annotated[tuple[int, ...], Field(max_length=MAX_BLOCKS)]


class Hello(Wire):
    """An engine introduces itself. `space` names everything that shapes its pages; each has `page_bytes` of payload."""

    space: Space
    page_bytes: Annotated[int, Field(ge=1, le=1 << 30)]
    kind: Literal["hello"] = "hello"


class Welcome(Wire):
    """Page n lies at n * slot_bytes of the arena, whose descriptor comes with this message over a Unix socket."""

    slot_bytes: Count
    slots: Count
    kind: Literal["welcome"] = "welcome"


class Refusal(Wire):
    """The cache will not serve this connection, which ends here."""

    why: str
    kind: Literal["refusal"] = "refusal"


class Find(Wire):
    """Which pages of this chain are there? The answer leases the longest run from its start."""

    hashes: Hashes
    kind: Literal["find"] = "find"


class Reserve(Wire):
    """Room for the pages of this chain that nobody has written or is writing, MAX_WRITE of them at most."""

    hashes: Hashes
    kind: Literal["reserve"] = "reserve"


class Leased(Wire):
    """`slots` follow the chain. To Find: as many as were found. To Reserve: one for each hash, -1 where none is needed."""

    lease: Count
    slots: Slots
    kind: Literal["leased"] = "leased"


class Commit(Wire):
    """The first `pages` reserved pages of the lease are written; the others are given back. Answered by Committed."""

    lease: Count
    pages: Count
    kind: Literal["commit"] = "commit"


class Committed(Wire):
    """How many pages others can find now: 0 when the lease had run out."""

    pages: Count
    kind: Literal["committed"] = "committed"


class Release(Wire):
    lease: Count
    kind: Literal["release"] = "release"


class Spoiled(Wire):
    """These pages did not verify: nobody shall be given them again."""

    hashes: Hashes
    kind: Literal["spoiled"] = "spoiled"


class Send(Wire):
    """Send `pages` slots of a read lease from the one at `first`: raw bytes follow at once, without an answer's frame."""

    lease: Count
    first: Count
    pages: Count
    kind: Literal["send"] = "send"


class Store(Wire):
    """The reserved page at `at` of a write lease: its slot's raw bytes follow this frame. No answer."""

    lease: Count
    at: Count
    kind: Literal["store"] = "store"


Talk = Hello | Welcome | Refusal | Find | Reserve | Leased | Commit | Committed | Release | Spoiled | Send | Store
