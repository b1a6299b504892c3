"""What becomes of a request's record when its client comes back, or when its log is lost. Pure.

The record's connection number says which streamer serves the client; its generation says which attempt counts.
"""

from collections.abc import Sequence

from shared.messages import Cancel, End, Message, Record
from shared.names import Streams


def attached(seen: Record, now: Record | None, clock_ms: int) -> Record | None:
    """The record once a client that comes back is served here. None: it has changed since `seen`, look again.

    The clock only settles what the broker forgot: where it lost a record, a later client still has the higher number.
    """
    if now != seen:
        return None
    return seen.model_copy(update={"connection": max(seen.connection + 1, clock_ms)})


def restored(
    mine: Record, now: Record | None, given: Sequence[bytes], ends: Sequence[End | None], log_from: str, least: int
) -> Record | None:
    """The record of a new attempt, which starts from what the client has. None: another connection serves the client.

    A lower connection in the broker's record means that the broker lost the newer one. It may have lost newer generations
    too, of which engines still know, as cancelled or as theirs: `least`, from the clock, is higher than those.
    """
    if now is not None and now.connection > mine.connection:
        return None
    newest = max(mine.submit.generation, now.submit.generation if now is not None else 0)
    start = {"generation": max(newest + 1, least), "given": tuple(given), "ends": tuple(ends), "log_from": log_from}
    return mine.model_copy(update={"submit": mine.submit.model_copy(update=start)})


def attempt(names: Streams, record: Record) -> list[tuple[str, Message]]:
    """What goes out with a restored record: engines stop the attempts before it, a tokenizer starts it."""
    before = Cancel(request=record.submit.request, generation=record.submit.generation - 1)
    return [(names.control, before), (names.submit, record.submit)]
