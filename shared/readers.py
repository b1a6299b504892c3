"""Readers of the broker's streams: a consumer of a group, and a tail. They end by a flag, never by cancellation.

A cancelled or broken group read may have been served all the same, so after any doubt a consumer first asks for what is
already its own (id 0), then for what is new.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.bus import FORGET_MS, GONE_MS, LEASE_MS, PAGE, START, Bus
from shared.connection import BLOCK_MS, BusDown, Refused
from shared.messages import Message

SHOW_EVERY_S = 2.0  # its connection may have broken meanwhile
LOOK_EVERY_S = 0.25  # for entries of readers that died; these wait for somebody to look
ALONE_EVERY_S = 1.0  # the same while there is no other reader: an idle mesh hardly wakes


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry handed to us by a group. `again`: somebody (perhaps we, before a crash) had it before."""

    entry: str
    message: Message
    again: bool = False


class Group:
    """One consumer of one consumer group. After any doubt it reads its own pending list before new entries."""

    def __init__(self, bus: Bus, stream: str, group: str, consumer: str) -> None:
        self._bus, self._line = bus, bus.line()
        self.stream, self.name, self.consumer = stream, group, consumer
        self._names = (stream, group)
        self._me = consumer.encode()
        self._presence, self._shown = bus.line(), 0.0
        self._doubt = True
        self.look_again_s = LOOK_EVERY_S  # when to ask for `stale` again

    async def close(self) -> None:
        """Leave the group, unless entries are still ours: those are for whoever takes over."""
        try:
            [mine] = await self._bus.run([("XPENDING", self.stream, self.name, "-", "+", 1, self.consumer)], patience_s=0)
            if not mine:
                await self._bus.run([("XGROUP", "DELCONSUMER", self.stream, self.name, self.consumer)], patience_s=0)
        except (Refused, BusDown):
            pass  # an idle consumer's name is all that stays behind
        await self._line.close()
        await self._presence.close()

    async def _create(self) -> None:
        # From id 0, never "$": what was queued before the group existed must be served.
        try:
            await self._bus.run([("XGROUP", "CREATE", self.stream, self.name, "0", "MKSTREAM")])
        except Refused as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def read(self, count: int) -> list[Delivery]:
        """What has arrived: up to `count` entries, after at most BLOCK_MS. Raises BusDown (after which: read again)."""
        doubt = self._doubt
        self._doubt = True
        if doubt:
            await self._show()
        block: tuple[Any, ...] = () if doubt else ("BLOCK", BLOCK_MS)
        where = "0" if doubt else ">"
        try:
            reply = await self._line.execute(
                "XREADGROUP", "GROUP", self.name, self.consumer, "COUNT", count, *block, "STREAMS", self.stream, where
            )
        except Refused as error:
            if not str(error).startswith("NOGROUP"):
                raise
            await self._create()
            return []
        entries = _entries(reply).get(self.stream, [])
        self._doubt = doubt and len(entries) >= count
        return await self._deliveries(entries, again=doubt)

    async def stale(self, count: int) -> list[Delivery]:
        """Entries whose reader has died, or gone silent for LEASE_MS: ours now, to be re-issued."""
        if time.monotonic() - self._shown > SHOW_EVERY_S:
            await self._show()
        claim = ("XAUTOCLAIM", *self._names, self.consumer, LEASE_MS, START, "COUNT", count)
        try:
            claimed, consumers = await self._bus.run([claim, ("XINFO", "CONSUMERS", *self._names)])
            entries = claimed[1]
            for consumer in await self._gone(consumers):
                entries += await self._inherit(consumer, count)
        except Refused:
            return []  # no such group yet
        return await self._deliveries(entries, again=True)

    async def _show(self) -> None:
        """Be seen by the others: a subscription ends with its connection, so at the moment at which this process dies."""
        self._shown = time.monotonic()
        with contextlib.suppress(BusDown):
            await self._presence.execute("SUBSCRIBE", self._bus.names.presence(self.name, self.consumer))

    async def _gone(self, rows: Iterable[Any]) -> list[str]:
        """Consumers that hold entries and are not here. Those that hold nothing and have long been silent are forgotten."""
        others = [row for row in (dict(zip(row[::2], row[1::2], strict=True)) for row in rows) if row[b"name"] != self._me]
        self.look_again_s = LOOK_EVERY_S if others else ALONE_EVERY_S
        holders = [row[b"name"].decode() for row in others if row[b"pending"]]
        idle = [row[b"name"] for row in others if not row[b"pending"] and row[b"idle"] > FORGET_MS]
        if idle:
            await self._bus.run([("XGROUP", "DELCONSUMER", *self._names, name) for name in idle])
        if not holders:
            return []
        channels = [self._bus.names.presence(self.name, holder) for holder in holders]
        [seen] = await self._bus.run([("PUBSUB", "NUMSUB", *channels)])
        return [holder for holder, count in zip(holders, seen[1::2], strict=True) if not count]

    async def _inherit(self, consumer: str, count: int) -> list[Any]:
        """Of two that inherit, the second finds the entries not idle any more."""
        [rows] = await self._bus.run([("XPENDING", *self._names, "IDLE", GONE_MS, "-", "+", count, consumer)])
        ids = [row[0] for row in rows]
        if not ids:
            return []
        [entries] = await self._bus.run([("XCLAIM", *self._names, self.consumer, GONE_MS, *ids)])
        return list(entries)

    async def _deliveries(self, entries: Iterable[Any], again: bool) -> list[Delivery]:
        read = await self._bus.read_all(self.stream, [entry for entry in entries if entry[1]])
        unreadable = [entry for entry, item in read if item is None]
        if unreadable:
            await self.ack(unreadable)
        return [Delivery(entry, item, again) for entry, item in read if item is not None]

    async def refresh(self, entries: Sequence[str]) -> set[str]:
        """Renew the lease on entries of ours; the answer names those we still hold."""
        if not entries:
            return set()
        try:
            [held] = await self._bus.run([("XCLAIM", self.stream, self.name, self.consumer, 0, *entries, "JUSTID")])
        except Refused:
            return set()  # the broker came back empty: nothing is ours
        return {entry.decode() for entry in held}

    async def ack(self, entries: Sequence[str]) -> None:
        """Done with: out of the pending list and out of the stream, whose length is then what is outstanding."""
        if entries:
            await self._bus.run([("XACK", self.stream, self.name, *entries), ("XDEL", self.stream, *entries)])

    async def hand_on(self, entries: Sequence[str], items: Sequence[tuple[str, Message]]) -> None:
        """Acknowledge entries in the same transaction that hands on what came of them, as (stream, message)."""
        adds = [command for stream, item in items for command in self._bus.adding(stream, item)]
        acks = [("XACK", self.stream, self.name, *entries), ("XDEL", self.stream, *entries)] if entries else []
        if adds or acks:
            await self._bus.run([*adds, *acks], atomic=True)


class Tail:
    """Follows streams from given positions: one blocking read for all of them."""

    def __init__(self, bus: Bus, positions: Mapping[str, str]) -> None:
        self._bus, self._line = bus, bus.line()
        self.positions = dict(positions)

    async def close(self) -> None:
        await self._line.close()

    async def read(self) -> list[tuple[str, str, Message]]:
        """What has arrived: (stream, entry, message), in order per stream. Raises BusDown."""
        streams = list(self.positions)
        command = ("XREAD", "COUNT", PAGE, "BLOCK", BLOCK_MS, "STREAMS", *streams, *(self.positions[name] for name in streams))
        reply = await self._line.execute(*command)
        arrived: list[tuple[str, str, Message]] = []
        for stream, entries in _entries(reply).items():
            for entry, item in await self._bus.read_all(stream, entries):
                if stream in self.positions:
                    self.positions[stream] = entry
                if item is not None:
                    arrived.append((stream, entry, item))
        return arrived


def _entries(reply: Any) -> dict[str, list[Any]]:
    return {stream.decode(): entries for stream, entries in reply or ()}
