"""A broker in memory that does what Redis does with the commands that the bus sends, and can lose a suffix of its writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.bus import entry_order
from shared.connection import Refused

Id = tuple[int, int]
Command = tuple[Any, ...]
WRITES = {"SET", "DEL", "XADD", "XDEL", "XGROUP", "XREADGROUP", "XAUTOCLAIM", "XCLAIM", "XACK"}
QUIET = {"XREADGROUP", "XAUTOCLAIM", "XCLAIM", "XACK", "XDEL", "DEL"}  # which write only if their answer says so


def text(id: Id) -> bytes:
    return f"{id[0]}-{id[1]}".encode()


def _changed(command: Command, reply: Any) -> bool:
    """A group that had nothing to give has written nothing."""
    return bool(reply[1] if command[0] == "XAUTOCLAIM" else reply) or command[0] not in QUIET


def _str(word: str | bytes) -> str:
    return word.decode() if isinstance(word, bytes) else word


@dataclass
class Pending:
    consumer: str
    since: int


@dataclass
class Consumers:
    last: Id = (0, 0)
    pending: dict[Id, Pending] = field(default_factory=dict)


@dataclass
class Stream:
    entries: dict[Id, list[bytes]] = field(default_factory=dict)
    last: Id = (0, 0)
    groups: dict[str, Consumers] = field(default_factory=dict)

    def after(self, id: Id, count: int) -> list[Any]:
        return [[text(at), fields] for at, fields in self.entries.items() if at > id][:count]


class Broker:
    """`now` is milliseconds, as the schedule has them; `file` is the append-only file, one row per transaction."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._clock, self._shift = now, 0
        self.incarnation = 0
        self.file: list[tuple[int, list[Command]]] = []
        self.watchers: dict[str, set[int]] = {}  # who is subscribed to a channel
        self._empty()

    def _empty(self) -> None:
        self.strings: dict[str, bytes] = {}
        self.streams: dict[str, Stream] = {}

    def restart(self, lost: int, shift: int = 0) -> None:
        """Come back without the last `lost` transactions; the file is read again from the start."""
        self.incarnation += 1
        self.watchers.clear()
        self._shift += shift
        if not lost:
            return  # reading it again would give what is here
        kept = self.file[: max(len(self.file) - lost, 0)]
        self._empty()
        self.file = []
        for at, commands in kept:
            self._now = at
            self._all(commands)

    def flush(self) -> None:
        self._empty()
        self.file = []

    def execute(self, commands: Sequence[Command]) -> list[Any]:
        self._now = self._clock() + self._shift
        return self._all(commands)

    def _all(self, commands: Sequence[Command]) -> list[Any]:
        replies = [getattr(self, f"_{command[0].lower()}")(*command[1:]) for command in commands]
        if any(command[0] in WRITES and _changed(command, reply) for command, reply in zip(commands, replies, strict=True)):
            self.file.append((self._now, list(commands)))
        return replies

    # -- strings ---------------------------------------------------------------------------------------------------

    def _info(self, _: str) -> bytes:
        return f"run_id:{self.incarnation}\r\n".encode()

    def _set(self, key: str, value: Any, *options: Any) -> None:
        if "NX" not in options or key not in self.strings:
            self.strings[key] = value if isinstance(value, bytes) else str(value).encode()

    def _get(self, key: str) -> bytes | None:
        return self.strings.get(key)

    def _del(self, key: str) -> int:
        return self.strings.pop(key, None) is not None

    def _expire(self, *_: Any) -> int:
        return 1

    # -- streams ---------------------------------------------------------------------------------------------------

    def _stream(self, name: str) -> Stream:
        return self.streams.setdefault(name, Stream())

    def _xadd(self, name: str, *rest: Any) -> bytes:
        stream, fields = self._stream(name), rest[rest.index("*") + 1 :]
        id = max((self._now, 0), (stream.last[0], stream.last[1] + 1))
        stream.entries[id] = list(fields)
        stream.last = id
        return text(id)

    def _xrange(self, name: str, start: str, end: str, *limit: Any) -> list[Any]:
        first, last = entry_order(start.lstrip("(")), (1 << 60, 0) if end == "+" else entry_order(end)
        found = [
            [text(at), fields]
            for at, fields in self._stream(name).entries.items()
            if (first < at if start[0] == "(" else first <= at) and at <= last
        ]
        return found[: limit[1]] if limit else found

    def _xrevrange(self, name: str, *_: Any) -> list[Any]:
        entries = self._stream(name).entries
        return [[text(at), entries[at]] for at in list(entries)[-1:]]

    def _xread(self, *words: Any) -> list[Any]:
        at, count = words.index("STREAMS"), words[words.index("COUNT") + 1]
        names = words[at + 1 :]
        half = len(names) // 2
        pairs = zip(names[:half], names[half:], strict=True)
        found = [(name.encode(), self._stream(name).after(entry_order(after), count)) for name, after in pairs]
        return [pair for pair in found if pair[1]]

    def _xdel(self, name: str, *ids: str) -> int:
        return sum(self._stream(name).entries.pop(entry_order(id), None) is not None for id in ids)

    def _xlen(self, name: str) -> int:
        return len(self._stream(name).entries)

    # -- presence --------------------------------------------------------------------------------------------------

    def _subscribe(self, channel: str, who: int) -> list[Any]:
        self.watchers.setdefault(channel, set()).add(who)
        return [b"subscribe", channel.encode(), 1]

    def _pubsub(self, _: str, *channels: str) -> list[Any]:
        return [word for name in channels for word in (name.encode(), len(self.watchers.get(name, ())))]

    # -- groups ----------------------------------------------------------------------------------------------------

    def _group(self, stream: str, name: str) -> Consumers:
        group = self._stream(stream).groups.get(name)
        if group is None:
            raise Refused(f"NOGROUP No such consumer group '{name}'")
        return group

    def _xgroup(self, verb: str, stream: str, name: str, *_: Any) -> None:
        assert verb == "CREATE"
        if name in self._stream(stream).groups:
            raise Refused("BUSYGROUP Consumer Group name already exists")
        self._stream(stream).groups[name] = Consumers()

    def _xreadgroup(self, *words: Any) -> list[Any]:
        _, name, consumer, _, count, *_ = words
        stream, where = words[-2:]
        group = self._group(stream, name)
        if where != ">":
            mine = [id for id, pending in sorted(group.pending.items()) if pending.consumer == consumer][:count]
            entries = [[text(id), self._stream(stream).entries.get(id)] for id in mine]
            return [(stream.encode(), entries)]
        fresh = self._stream(stream).after(group.last, count)
        for id, _ in fresh:
            group.last = entry_order(id.decode())
            group.pending[group.last] = Pending(consumer, self._now)
        return [(stream.encode(), fresh)] if fresh else []

    def _take(self, stream: str, name: str, consumer: str, idle: int, ids: Sequence[Id]) -> list[Id]:
        group, taken = self._group(stream, name), []
        for id in ids:
            pending = group.pending.get(id)
            if pending is None or self._now - pending.since < idle:
                continue
            if id not in self._stream(stream).entries:
                del group.pending[id]
                continue
            group.pending[id] = Pending(consumer, self._now)
            taken.append(id)
        return taken

    def _xautoclaim(self, stream: str, name: str, consumer: str, idle: int, *rest: Any) -> list[Any]:
        ids = sorted(self._group(stream, name).pending)
        taken = self._take(stream, name, consumer, idle, ids)[: rest[-1]]
        return [b"0-0", [[text(id), self._stream(stream).entries[id]] for id in taken], []]

    def _xclaim(self, stream: str, name: str, consumer: str, idle: int, *ids: Any) -> list[Any]:
        just = ids[-1] == "JUSTID"
        taken = self._take(stream, name, consumer, idle, [entry_order(_str(id)) for id in ids if id != "JUSTID"])
        return [text(id) if just else [text(id), self._stream(stream).entries[id]] for id in taken]

    def _xinfo(self, _: str, stream: str, name: str) -> list[Any]:
        held: dict[str, int] = {}
        for pending in self._group(stream, name).pending.values():
            held[pending.consumer] = held.get(pending.consumer, 0) + 1
        return [[b"name", consumer.encode(), b"pending", count, b"idle", 0] for consumer, count in held.items()]

    def _xpending(self, stream: str, name: str, *words: Any) -> list[Any]:
        idle, count, consumer = words[1], words[4], words[5]
        rows = sorted(self._group(stream, name).pending.items())
        return [[text(id)] for id, row in rows if row.consumer == consumer and self._now - row.since >= idle][:count]

    def _xack(self, stream: str, name: str, *ids: str) -> int:
        group = self._stream(stream).groups.get(name)
        return sum(group.pending.pop(entry_order(id), None) is not None for id in ids) if group else 0
