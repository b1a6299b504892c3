"""Restoring a request whose log cannot be followed any more. Delivered to the client > log > engine memory."""

import logging
from typing import TYPE_CHECKING

from services.streamer.session import Session
from shared.bus import BusDown
from shared.messages import Cancel, Record

if TYPE_CHECKING:
    from services.streamer.service import Streamer  # which calls us

log = logging.getLogger("headrace")


async def restore(streamer: "Streamer", session: Session) -> None:
    """Start a new attempt from what the client has: the log cannot be followed, or the broker lost it."""
    if session.restoring:
        return
    session.restoring = True
    try:
        await _restore(streamer, session)
    except BusDown as error:
        session.conflict = True  # so that `look_after` tries again
        log.warning("%s: %s is not restored yet: %s", streamer.config.id, session.id, error)
    finally:
        session.restoring = False


async def _restore(streamer: "Streamer", session: Session) -> None:
    log_from = await streamer.bus.last_entry(streamer.bus.names.tokens(session.partition))
    submit = session.record.submit  # from here to `begin` nothing may be awaited: what was told must not grow
    given, ends = session.delivered()
    generation = max(submit.generation, session.follower.epoch[0]) + 1
    update = {"generation": generation, "given": given, "ends": ends, "log_from": log_from}
    record = session.record.model_copy(update={"submit": submit.model_copy(update=update)})
    session.begin(record)

    def ours(now: Record | None) -> bool:
        # A lower connection there means that the broker lost the newer record, a higher one that we are superseded.
        return now is None or (now.connection <= record.connection and now.submit.generation < generation)

    if not await streamer.bus.save(record, streamer.config.keep_s, ours):
        session.fail("superseded", "another connection serves this request now")
        return
    streamer.life.stats.counters["restores"] += 1
    log.warning("%s: restoring %s from %s tokens", streamer.config.id, session.id, session.counts)
    await streamer.bus.cancel(Cancel(request=session.id, generation=generation - 1))
    await streamer.bus.append(streamer.bus.names.submit, record.submit)
