"""A client comes back with its cursor, to this streamer or any other: the record and the log tell what it has."""

import time

from services.streamer.attempts import attached
from services.streamer.restore import restore
from services.streamer.service import Streamer
from services.streamer.session import Session, StreamError
from shared.bus import entry_order
from shared.messages import Attach, Step
from shared.tokenlog import agrees, counts_of, newest


async def attach(streamer: Streamer, request: str, cursor: str, tenant: str) -> Session:
    """Serve a client that comes back with its cursor. Raises StreamError `stream_lost`, BusDown, ValueError."""
    while True:
        record = await streamer.bus.load(request)
        if record is None or record.submit.tenant != tenant:  # another tenant's is as unknown as none
            raise StreamError("stream_lost", "this request is not known (any more)")
        session = Session(record, streamer.vocab)
        counts = counts_of(cursor, len(session.outputs)) if cursor else session.counts
        streamer.attaching.add(session)
        try:
            await _catch_up(streamer, session)
            _check(cursor, session)
            if await _supersede(streamer, session):
                session.skip(counts)
                _serve(streamer, session)
                return session
        finally:
            streamer.attaching.discard(session)


def _check(cursor: str, session: Session) -> None:
    """Raises StreamError where the log does not tell what the client has."""
    if cursor and not agrees(cursor, session.follower.choices):
        safe = newest(session.follower.choices)
        raise StreamError("stream_lost", f"the log does not hold the stream up to cursor {cursor}: it ends at {safe}")


def _serve(streamer: Streamer, session: Session) -> None:
    before = streamer.sessions.get(session.id)
    if before is not None:
        before.fail("superseded", "another connection serves this request now")
    streamer.expected(session.id)
    streamer.sessions[session.id] = session
    if session.conflict:
        streamer.start(restore(streamer, session))
    session.news.set()
    streamer.life.stats.counters["resumes"] += 1


async def _supersede(streamer: Streamer, session: Session) -> bool:
    """Count the connection up and tell whoever served the client before. False: the record has changed meanwhile."""
    seen, stream = session.record, streamer.bus.names.tokens(session.partition)
    record = await streamer.bus.change(
        session.id,
        lambda now: attached(seen, now, int(1000 * time.time())),
        lambda record: [(stream, Step(records=(Attach(request=session.id, connection=record.connection),)))],
    )
    if record is None:
        return False
    session.record = record
    await _catch_up(streamer, session)
    return True


async def _catch_up(streamer: Streamer, session: Session) -> None:
    """Read the log from where the attempt began until the tail can take over without a gap."""
    stream = streamer.bus.names.tokens(session.partition)
    while True:
        said, newest_entry = await streamer.bus.told(stream, session.id, session.position)
        for entry, record in said:
            session.apply(entry, record)
        session.position = newest_entry
        if stream not in streamer.tail.positions:
            streamer.tail.positions[stream] = session.position
            await _wake_tail(streamer)
        if entry_order(streamer.tail.positions[stream]) <= entry_order(session.position):
            return


async def _wake_tail(streamer: Streamer) -> None:
    """An empty entry of our own ends the tail's blocking read, which does not know of a stream just added."""
    await streamer.bus.append(streamer.bus.names.tokens(streamer.partition), Step(records=()))
