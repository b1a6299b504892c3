"""The broker's commands: entries, request records and the mesh's members; `readers` build on it.

Every write here is safe to repeat. Nothing newer than Redis 7.0 is used, and no script.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from redis.exceptions import WatchError

from shared.codec import Malformed, decode, encode, records_of
from shared.connection import Line, Patience, connect, patiently
from shared.messages import Beat, Cancel, LogRecord, Message, Record
from shared.names import Streams

LEASE_MS = 3000  # an entry that its reader has not refreshed for this long may be taken over
GONE_MS = 600  # the same for the entries of a reader whose connection to the broker has ended
FORGET_MS = 600_000
KEEP_S = 1200
MEMBER_TTL_S = 5
ERA_S = 3600  # every heartbeat renews it
DEAD_LETTERS = 1000
CONTROL_ENTRIES = 10_000
PAGE = 500  # entries read at a time, so that no reply is unbounded
LOG_PAGE = 100  # the same where each entry is taken apart at once: a few milliseconds
FIELD = b"m"
START = "0-0"


@lru_cache(maxsize=4096)  # asked for each record of an entry
def entry_order(entry: str) -> tuple[int, int]:
    """Entry ids as numbers, so that they compare in log order."""
    ms, _, seq = entry.partition("-")
    return int(ms), int(seq)


class Bus:
    """Commands on a pool of connections. Raises BusDown where the broker stays away for longer than `patience`.

    Records and token logs end `keep_s` after they were last written (or kept).
    """

    def __init__(self, url: str, model: str, patience_s: float = 30.0, keep_s: int = KEEP_S) -> None:
        self.names = Streams(model)
        self.keep_s = keep_s
        self._url = url
        self.patience = Patience(patience_s)
        self._redis = connect(url, connections=16, timeout_s=5)

    async def close(self) -> None:
        await self._redis.aclose()

    def line(self) -> Line:
        return Line(self._url)

    async def run(
        self, commands: Sequence[tuple[Any, ...]], patience_s: float | None = None, atomic: bool = False
    ) -> list[Any]:
        """One round trip of several commands, all of them safe to repeat."""

        async def call() -> list[Any]:
            async with self._redis.pipeline(transaction=atomic) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                replies: list[Any] = await pipe.execute()
                return replies

        return await patiently(call, self.patience if patience_s is None else Patience(patience_s))

    async def incarnation(self) -> str:
        """An id that changes whenever the broker restarts or is flushed (and so may have lost what it had)."""
        key = self.names.era
        mark = [("SET", key, os.urandom(8).hex(), "NX", "EX", ERA_S), ("EXPIRE", key, ERA_S), ("GET", key)]
        info, _, _, era = await self.run([("INFO", "server"), *mark])
        return f"{info.partition(b'run_id:')[2].split()[0].decode()}:{(era or b'').decode()}"

    async def append(self, stream: str, item: Message) -> str:
        commands = self.adding(stream, item)
        entry = (await self.run(commands, atomic=len(commands) > 1))[0]
        return str(entry.decode())

    def adding(self, stream: str, item: Message) -> list[tuple[Any, ...]]:
        """The commands that append, to be run in one transaction: nobody who dies here leaves a log that never ends."""
        trim = ("MAXLEN", "~", CONTROL_ENTRIES) if stream == self.names.control else ()
        add = ("XADD", stream, *trim, "*", FIELD, encode(item))
        return [add, self.keeping(stream)] if stream.startswith(self.names.tokens("")) else [add]

    def keeping(self, stream: str) -> tuple[Any, ...]:
        """The command that lets a token log live on."""
        return ("EXPIRE", stream, self.keep_s)

    async def keep(self, stream: str) -> None:
        await self.run([self.keeping(stream)])

    async def last_entry(self, stream: str) -> str:
        [entries] = await self.run([("XREVRANGE", stream, "+", "-", "COUNT", 1)])
        return str(entries[0][0].decode()) if entries else START

    async def told(self, stream: str, request: str, after: str, until: str = "+") -> tuple[list[tuple[str, LogRecord]], str]:
        """What the log tells of a request, after one entry up to another, inclusive; and the newest entry that was read."""
        found: list[tuple[str, LogRecord]] = []
        while True:
            [page] = await self.run([("XRANGE", stream, f"({after}", until, "COUNT", LOG_PAGE)])
            for raw, fields in page:
                after = raw.decode()
                with contextlib.suppress(Malformed):  # whoever follows the stream keeps it in `dead`
                    found += [(after, record) for record in records_of(fields[-1], request)]
            if len(page) < LOG_PAGE:
                return found, after

    async def depths(self, streams: Sequence[str]) -> list[int]:
        return [int(depth) for depth in await self.run([("XLEN", stream) for stream in streams])]

    async def holds(self, stream: str, entry: str) -> bool:
        """Whether some reader of the group still has this entry, or has yet to be given it."""
        [entries] = await self.run([("XRANGE", stream, entry, entry)])
        return bool(entries)

    async def read_all(self, stream: str, raw: Iterable[Any]) -> list[tuple[str, Message | None]]:
        """Decode entries; None marks what is not ours, which goes to `dead` for people to look at."""
        read: list[tuple[str, Message | None]] = []
        for entry, fields in raw:
            packed = fields[1] if len(fields) == 2 and fields[0] == FIELD else b""
            try:
                read.append((entry.decode(), decode(packed)))
            except Malformed as error:
                read.append((entry.decode(), None))
                note = (b"stream", stream, b"entry", entry, b"why", str(error), b"m", packed[:4096])
                await self.run([("XADD", self.names.dead, "MAXLEN", "~", DEAD_LETTERS, "*", *note)])
        return read

    # -- request records -------------------------------------------------------------------------------------------

    async def open(self, record: Record) -> None:
        """A new request in one round trip. Nobody else knows its id yet."""
        await self.run(self.opening(record))

    def opening(self, record: Record) -> list[tuple[Any, ...]]:
        """The commands that open a request: its record, then its submission."""
        key, submit = self.names.record(record.submit.request), record.submit
        # NX: sent again after a lost reply, it must not undo what a restore has made of the record meanwhile.
        return [("SET", key, encode(record), "NX", "EX", self.keep_s), *self.adding(self.names.submit, submit)]

    async def load(self, request: str) -> Record | None:
        [packed] = await self.run([("GET", self.names.record(request))])
        return _record(packed)

    async def drop(self, item: Cancel) -> None:
        """Nobody wants this request any more: its record goes, and engines hear so."""
        await self.run([("DEL", self.names.record(item.request)), *self.adding(self.names.control, item)], atomic=True)

    async def change(
        self,
        request: str,
        to: Callable[[Record | None], Record | None],
        notes: Callable[[Record], Sequence[tuple[str, Message]]] = lambda _: (),
    ) -> Record | None:
        """Compare and set: `to` says what becomes of the record that is there, or refuses (None).

        What `notes` says about the new record, as (stream, message), goes out in the same transaction: nobody who dies here
        leaves one without the other. A lost reply shows as a record that is ours already, and `to` is asked again.
        """
        key = self.names.record(request)
        while True:
            [before] = await self.run([("GET", key)])
            record = to(_record(before))
            if record is None:
                return None
            adds = [command for stream, item in notes(record) for command in self.adding(stream, item)]
            if await self.swap(key, before, [("SET", key, encode(record), "EX", self.keep_s), *adds]):
                return record

    async def swap(self, key: str, before: bytes | None, commands: Sequence[tuple[Any, ...]]) -> bool:
        """Run commands as one transaction if the key still holds what it held before."""

        async def call() -> bool:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(key)
                if await pipe.get(key) != before:
                    return False
                pipe.multi()
                for command in commands:
                    pipe.execute_command(*command)
                try:
                    await pipe.execute()
                except WatchError:
                    return False
                return True

        return await patiently(call, self.patience)

    # -- members of the mesh ---------------------------------------------------------------------------------------

    async def beat(self, item: Beat) -> None:
        key = self.names.member(item.stage, item.id)
        await self.run(
            [
                ("SET", key, encode(item), "EX", MEMBER_TTL_S),
                ("SADD", self.names.members, key),
                ("EXPIRE", self.names.members, 60),
            ],
            patience_s=0,
        )

    async def leave(self, stage: str, id: str) -> None:
        key = self.names.member(stage, id)
        await self.run([("DEL", key), ("SREM", self.names.members, key)], patience_s=0)

    async def member(self, stage: str, id: str) -> Beat | None:
        [packed] = await self.run([("GET", self.names.member(stage, id))])
        item = decode(packed) if packed else None
        return item if isinstance(item, Beat) else None

    async def members(self) -> list[Beat]:
        [keys] = await self.run([("SMEMBERS", self.names.members)], patience_s=1)
        if not keys:
            return []
        ordered = sorted(keys)
        [values] = await self.run([("MGET", *ordered)], patience_s=1)
        gone = [key for key, value in zip(ordered, values, strict=True) if value is None]
        if gone:
            await self.run([("SREM", self.names.members, *gone)], patience_s=1)
        return [item for value in values if value is not None and isinstance(item := decode(value), Beat)]


def _record(packed: Any) -> Record | None:
    try:
        item = decode(packed) if packed else None
    except Malformed:
        return None
    return item if isinstance(item, Record) else None
