"""Idempotency keys: who asks again with the same key gets the same request, from its start, on any streamer.

The broker keeps, for each key of a tenant, which request it names and a digest of what was asked. That mark is written in one
transaction with the request's record and submission, so that of several who ask at once one computes and the others attach.
"""

import hashlib
import re
import time
from dataclasses import dataclass

from services.streamer.admission import Overloaded
from services.streamer.body import BadRequest
from services.streamer.schema import Generation
from shared.bus import Bus
from shared.messages import Record

HEADER = "Idempotency-Key"
MAX_KEYS = 10_000  # of one tenant at a time; each is kept for as long as a request's record
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_UNASKED = {"type", "id", "idempotency_key"}  # fields of a frame that are not the question


@dataclass(frozen=True, slots=True)
class Mark:
    """A tenant's key, hashed, and the digest of the body that came with it."""

    tenant: str
    name: str
    digest: str


def mark_of(tenant: str, key: str, body: Generation) -> Mark:
    """Raises BadRequest."""
    if not _KEY.fullmatch(key):
        raise BadRequest(f"{HEADER} must be 1 to 255 printable ASCII characters without spaces", HEADER)
    asked = body.model_dump_json(exclude_unset=True, exclude=_UNASKED)
    return Mark(tenant, _hash(key), _hash(asked))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Once:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def held(self, mark: Mark) -> bytes | None:
        """What the broker has of this key. Raises BadRequest (422: it came with another body), Overloaded, BusDown."""
        held, _, count = await self._bus.run(
            [
                ("GET", self._name(mark)),
                ("ZREMRANGEBYSCORE", self._all(mark), "-inf", time.time()),
                ("ZCARD", self._all(mark)),
            ]
        )
        if held is None and count >= MAX_KEYS:
            raise Overloaded(f"more than {MAX_KEYS} idempotency keys at a time", 429, 60)
        if held is not None and _parts(held)[1] != mark.digest:
            raise BadRequest(f"this {HEADER} came with another body before", HEADER, "idempotency_key_reused", 422)
        return bytes(held) if held else None

    async def open(self, mark: Mark, before: bytes | None, record: Record) -> bool:
        """Open the request under its key. False: somebody else has, since `before` was held. Raises BusDown."""
        keep_s, value = self._bus.keep_s, f"{record.submit.request}:{mark.digest}"
        note = [
            ("SET", self._name(mark), value, "EX", keep_s),
            ("ZADD", self._all(mark), time.time() + keep_s, mark.name),
            ("EXPIRE", self._all(mark), keep_s),
        ]
        return await self._bus.swap(self._name(mark), before, [*note, *self._bus.opening(record)])

    def _name(self, mark: Mark) -> str:
        return self._bus.names.once(mark.tenant, mark.name)

    def _all(self, mark: Mark) -> str:
        return self._bus.names.once(mark.tenant, "all")


def request_of(held: bytes) -> str:
    return _parts(held)[0]


def _parts(held: bytes) -> tuple[str, str]:
    request, _, digest = held.decode().partition(":")
    return request, digest
