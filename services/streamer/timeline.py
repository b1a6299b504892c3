"""One request's way through all stages, as one structured log line. Never a prompt, never an answer. Pure."""

from typing import Any

import orjson

from services.streamer.session import Session


def timeline(session: Session) -> str:
    return orjson.dumps(told(session)).decode()


def told(session: Session) -> dict[str, Any]:
    submit, follower = session.record.submit, session.follower
    return {
        "request": session.id,
        "key": session.key.name if session.key.digest else submit.tenant,
        "outcome": session.error.code if session.error else [output.finish or "left" for output in session.outputs],
        "prompt_tokens": follower.prompt_tokens,
        "output_tokens": session.counts,
        "connection": session.record.connection,
        "restored": submit.generation > 0,
        "fenced_records": follower.fenced,
        **session.timings(),
    }
