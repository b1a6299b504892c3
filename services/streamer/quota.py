"""What one key may use, counted in the broker, so that all streamers share it. A refusal says when to try again."""

import time

from services.streamer.admission import Overloaded
from services.streamer.keys import Key
from shared.bus import Bus
from shared.connection import Refused

MINUTE_S = 60
SLOT_S = 30  # a stream whose streamer has not renewed it for so long does not count any more


class Quota:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def _name(self, key: Key, what: str) -> str:
        return self._bus.names.quota(key.name, what)

    async def enter(self, key: Key, request: str) -> None:
        """Count a request in. Raises Overloaded, BusDown."""
        if not key.limits:
            return
        now = time.time()
        rate, streams = self._name(key, f"requests:{int(now)}"), self._name(key, "streams")
        asked, _, _, _, _, at_once, spent = await self._bus.run(
            [
                ("INCR", rate),
                ("EXPIRE", rate, 2),
                ("ZREMRANGEBYSCORE", streams, "-inf", now),
                ("ZADD", streams, now + SLOT_S, request),
                ("EXPIRE", streams, MINUTE_S),
                ("ZCARD", streams),
                ("GET", self._tokens(key, now)),
            ]
        )
        limits = key.limits
        refusal = (
            Overloaded(f"more than {limits.requests} requests a second", 429, 1)
            if limits.requests and asked > limits.requests
            else Overloaded(f"more than {limits.tokens} tokens a minute", 429, MINUTE_S - int(now) % MINUTE_S)
            if limits.tokens and int(spent or 0) >= limits.tokens
            else Overloaded(f"more than {limits.streams} streams at once", 429, 1)
            if limits.streams and at_once > limits.streams
            else None
        )
        if refusal is not None:
            await self._bus.run([("ZREM", streams, request)])
            raise refusal

    def _tokens(self, key: Key, now: float) -> str:
        return self._name(key, f"tokens:{int(now) // MINUTE_S}")

    async def renew(self, open: list[tuple[Key, str]]) -> None:
        """Streams that are still served keep their places. Raises BusDown."""
        until = time.time() + SLOT_S
        places = [("ZADD", self._name(key, "streams"), until, request) for key, request in open if key.limits.streams]
        if places:
            await self._bus.run(places)

    async def leave(self, key: Key, request: str, tokens: int) -> None:
        """The place is free, and the tokens count against the minute in which they ended. Raises BusDown."""
        if not key.limits:
            return
        spent = self._tokens(key, time.time())
        await self._bus.run(
            [
                ("ZREM", self._name(key, "streams"), request),
                ("INCRBY", spent, tokens),
                ("EXPIRE", spent, 2 * MINUTE_S),
            ]
        )


class Tickets:
    """One-use passes for browsers, which cannot send a header with a WebSocket: valid for TICKET_S, kept hashed."""

    TICKET_S = 30

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def issue(self, hashed: str, key: Key) -> None:
        await self._bus.run([("SET", self._bus.names.ticket(hashed), key.name, "EX", self.TICKET_S)])

    async def redeem(self, hashed: str) -> str:
        """The name of the key that it was given to; empty when there is no such ticket (any more). Raises BusDown."""
        try:
            [name] = await self._bus.run([("GETDEL", self._bus.names.ticket(hashed))])
        except Refused:
            return ""
        return name.decode() if name else ""
