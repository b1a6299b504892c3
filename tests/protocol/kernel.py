"""Runs the services' own coroutines without an event loop, one broker call at a time, in an order drawn from a seed.

Wherever a coroutine awaits the broker it can be paused, crashed, or have its call delayed, repeated or answered by a broken
connection. A call that was sent may be executed while its sender is paused, and also after it has died.
"""

import random
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.bus import KEEP_S, Bus, entry_order
from shared.connection import BusDown, Patience, Refused
from shared.names import Streams
from tests.protocol.broker import Broker, Command, Id

STEP_MS = 10
BLOCK_MS = 2000


@dataclass
class Call:
    """What a coroutine waits for: an answer of the broker, or (with `ready`) a moment."""

    commands: Sequence[Command] = ()
    line: bool = False  # a blocking reader's own connection: never repeated, broken by a restart
    atomic: bool = False
    guard: tuple[str, bytes | None] | None = None  # only if this key holds this value
    ready: Callable[[], bool] | None = None
    wake: int = 0  # no sooner than this
    since: int = 0
    answered: bool = False
    answer: Any = None
    block_ms: int = 0
    reads: list[tuple[str, Id | None]] = field(default_factory=list)  # what a blocking read waits for; None: a group's new ones


def blocking(words: Command) -> Call:
    at = words.index("STREAMS") + 1 if "STREAMS" in words else len(words)
    half = (len(words) - at) // 2
    pairs = zip(words[at : at + half], words[at + half :], strict=True)
    reads = [(name, entry_order(after) if "-" in after else None) for name, after in pairs]
    return Call(commands=[words], line=True, block_ms=BLOCK_MS if "BLOCK" in words else 0, reads=reads)


def _at_once() -> bool:
    return True


@types.coroutine
def ask(call: Call) -> Generator[Call, Any, Any]:
    return (yield call)


@dataclass(eq=False)
class Task:
    coroutine: Coroutine[Any, Any, Any]
    call: Call | None = None


@dataclass(eq=False)
class Process:
    name: str
    waiting: list[tuple["Process", Task]]  # the kernel's
    tasks: list[Task] = field(default_factory=list)
    paused_until: int = 0
    held: bool = False  # while it is paused: what it was sending has not left its machine

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = Task(coroutine)
        self.tasks.append(task)
        self.waiting.append((self, task))


class Kernel:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1_000_000
        self.broker = Broker(lambda: self.now)
        self.processes: dict[str, Process] = {}
        self.waiting: list[tuple[Process, Task]] = []  # all tasks of all processes
        self.flying: list[Call] = []  # sent by processes that have died since
        self.repeats = 0.05

    def process(self, name: str) -> Process:
        self.processes[name] = Process(name, self.waiting)
        return self.processes[name]

    # -- what a schedule is made of --------------------------------------------------------------------------------

    def step(self) -> None:
        """Let one thing happen: a call reaches the broker, or an answer its sender."""
        self.now += STEP_MS
        if self.flying and self.random.random() < 0.02:
            self._execute(self.flying.pop(self.random.randrange(len(self.flying))))
            return
        waiting = self.waiting
        first = int(self.random.random() * len(waiting))
        for at in range(first - len(waiting), first):
            process, task = waiting[at]
            if self._able(process, task):
                self._advance(process, task)
                return
        self.now += 10 * STEP_MS

    def _able(self, process: Process, task: Task) -> bool:
        call = task.call
        if call is None or call.answered:
            return self.now >= process.paused_until
        if call.ready is not None:
            return call.wake <= self.now >= process.paused_until and call.ready()
        if process.held and self.now < process.paused_until:
            return False
        return not call.line or self._arrived(call)

    def _arrived(self, call: Call) -> bool:
        """A blocking read is answered when there is something, or when it has waited for long enough."""
        if self.now - call.since >= call.block_ms:
            return True
        for name, after in call.reads:
            stream = self.broker.streams.get(name)
            if after is None:
                group = stream.groups.get(call.commands[0][2]) if stream else None
                if group is None or (stream and stream.last > group.last):
                    return True
            elif stream and stream.last > after:
                return True
        return False

    def _advance(self, process: Process, task: Task) -> None:
        call = task.call
        if call is not None and not call.answered and call.ready is None:
            self._execute(call)
            return
        try:
            if call is not None and isinstance(call.answer, Exception):
                task.call = task.coroutine.throw(call.answer)
            else:
                task.call = task.coroutine.send(None if call is None else call.answer)
            task.call.since = self.now
        except StopIteration:
            process.tasks.remove(task)
            self.waiting.remove((process, task))

    def _execute(self, call: Call) -> None:
        for _ in range(2 if not call.line and self.random.random() < self.repeats else 1):  # an answer was lost: sent again
            call.answer = self._answer(call)
        call.answered = True

    def _answer(self, call: Call) -> Any:
        if call.guard is not None and self.broker.strings.get(call.guard[0]) != call.guard[1]:
            return False
        try:
            replies = self.broker.execute(call.commands) if call.atomic else self._one_by_one(call.commands)
        except Refused as error:
            return error
        return True if call.guard is not None else replies[0] if call.line else replies

    def _one_by_one(self, commands: Sequence[Command]) -> list[Any]:
        return [reply for command in commands for reply in self.broker.execute([command])]

    def close(self) -> None:
        for process in self.processes.values():
            for task in process.tasks:
                task.coroutine.close()

    def through(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Nothing but this, to its end, each call answered at once."""
        call = None
        try:
            while True:
                call = coroutine.send(call and call.answer)
                self.now += STEP_MS
                self._execute(call)
        except StopIteration as end:
            return end.value

    # -- faults ----------------------------------------------------------------------------------------------------

    def crash(self, name: str) -> Process:
        """Whatever was on its way may still arrive. Returns the process that takes its place."""
        for task in self.processes[name].tasks:
            call = task.call
            if call is not None and call.commands and not call.answered and not call.line and self.random.random() < 0.5:
                self.flying.append(self._part(call))
            task.coroutine.close()
        self.waiting[:] = [pair for pair in self.waiting if pair[0] is not self.processes[name]]
        for watchers in self.broker.watchers.values():
            watchers.discard(id(self.processes[name]))
        return self.process(name)

    def _part(self, call: Call) -> Call:
        """A pipeline that is no transaction may be cut anywhere."""
        if call.atomic or len(call.commands) < 2:
            return call
        return Call(commands=call.commands[: self.random.randrange(1, len(call.commands) + 1)])

    def pause(self, name: str, ms: int) -> None:
        process = self.processes[name]
        process.paused_until, process.held = self.now + ms, self.random.random() < 0.6

    def break_connections(self) -> None:
        """The broker has restarted: blocking readers see it; answers of others are lost, so that they send again."""
        self.flying.clear()
        for process in self.processes.values():
            for task in process.tasks:
                call = task.call
                if call is None or call.ready is not None:
                    continue
                if call.line:
                    call.answered, call.answer = True, BusDown("the connection is gone")
                elif call.answered and self.random.random() < 0.5:
                    call.answered = False

    # -- waiting ---------------------------------------------------------------------------------------------------

    async def sleep(self, ms: int) -> None:
        await ask(Call(ready=_at_once, wake=self.now + ms))

    async def until(self, ready: Callable[[], bool]) -> None:
        await ask(Call(ready=ready))


class SimBus(Bus):
    """The bus, with the schedule's broker behind it. Everything but the connections is the real one's."""

    def __init__(self, kernel: Kernel, process: str) -> None:
        self.names, self.keep_s = Streams("m"), KEEP_S
        self.patience = Patience(0)
        self.kernel, self.process = kernel, process

    async def close(self) -> None:
        pass

    def line(self) -> "SimLine":  # type: ignore[override]
        return SimLine(self)

    async def run(self, commands: Sequence[Command], patience_s: float | None = None, atomic: bool = False) -> list[Any]:
        replies: list[Any] = await ask(Call(commands=list(commands), atomic=atomic))
        return replies

    async def swap(self, key: str, before: bytes | None, commands: Sequence[Command]) -> bool:
        return bool(await ask(Call(commands=list(commands), atomic=True, guard=(key, before))))


class SimLine:
    def __init__(self, bus: SimBus) -> None:
        self._bus = bus

    async def execute(self, *command: Any) -> Any:
        if command[0] == "SUBSCRIBE":
            command = (*command, id(self._bus.kernel.processes[self._bus.process]))
        return await ask(blocking(command))

    async def close(self) -> None:
        pass
