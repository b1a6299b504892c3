"""Restoring a request whose log cannot be followed any more. Delivered to the client > log > engine memory."""

import logging
import time
from typing import TYPE_CHECKING

from services.streamer.attempts import attempt, restored
from services.streamer.session import Session
from shared.connection import BusDown
from shared.messages import Cancel

if TYPE_CHECKING:
    from services.streamer.service import Streamer  # which calls us

log = logging.getLogger("headrace")


async def restore(streamer: "Streamer", session: Session) -> None:
    """Start a new attempt from what the client has: the log cannot be followed, or the broker lost it."""
    if session.restoring or session.done:
        return
    session.restoring = True
    try:
        await _restore(streamer, session)
    except BusDown as error:
        session.conflict = True  # so that `look_after` tries again
        log.warning("%s: %s is not restored yet: %s", streamer.config.id, session.id, error)
    finally:
        session.restoring = False
        session.held.clear()


async def _restore(streamer: "Streamer", session: Session) -> None:
    bus, before = streamer.bus, session.record
    log_from = await bus.last_entry(bus.names.tokens(session.partition))
    session.conflict = True  # from here on it holds what it hears: the new attempt may begin before we hear that it may
    given, ends = session.known()
    least = max(session.follower.epoch[0] + 1, int(1000 * time.time()))
    record = await bus.change(
        session.id,
        lambda now: None if session.done else restored(before, now, given, ends, log_from, least),
        lambda record: attempt(bus.names, record),
    )
    if record is None:
        if not session.done:
            session.fail("superseded", "another connection serves this request now")
        return
    session.begin(record)
    if session.done and not session.superseded:  # its client has left, or has all it wanted, meanwhile
        await bus.append(bus.names.control, Cancel(request=session.id, generation=record.submit.generation))
    streamer.life.stats.counters["restores"] += 1
    log.warning("%s: restored %s from %s tokens", streamer.config.id, session.id, session.counts)
