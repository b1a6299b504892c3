"""One random schedule: a request, three engines, two tokenizers, two streamers, a client that moves, a broker, and faults.

The faults stop after a while; then the request must end. What the client has is checked token by token.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest.mock import patch

from shared.connection import Refused
from tests.protocol.actors import Engine, SimStreamer, Socket, Tokens, new_record, root, tokenizer
from tests.protocol.kernel import Kernel

ENGINES, TOKENIZERS, STREAMERS = ("e0", "e1", "e2"), ("t0", "t1"), ("s0", "s1")
FAULTS_UNTIL_MS, STUCK_AFTER_MS = 40_000, 400_000
MODULES = ("service", "session", "attach", "restore")  # those that ask what time it is


@dataclass
class Outcome:
    """`violation` is empty, or what went wrong; `lost`: the client was told that its stream cannot be rebuilt."""

    violation: str = ""
    lost: bool = False
    wasted: int = 0  # tokens drawn beyond those delivered
    took_ms: int = 0
    superseded: int = 0
    faults: dict[str, int] = field(default_factory=dict)


class Text:
    """Stands for services.streamer.decode.TextStream: text is not what is proved here."""

    stopped = False

    def __init__(self, *_: object) -> None:
        pass

    def push(self, id: int) -> str:
        return f"{id} "

    def finish(self) -> str:
        return ""


class Schedule:
    def __init__(self, seed: int, loss: bool) -> None:
        self.kernel = kernel = Kernel(seed)
        rng = self.random = kernel.random
        self.loss = loss
        self.tokens = Tokens(rng, greedy=rng.choice((0.0, 0.5, 1.0)))
        self.choices, self.length = rng.choice((1, 1, 2, 3)), rng.choice((3, 8, 20, 40))
        self.rate = rng.choice((0.003, 0.01, 0.03, 0.06))
        self.outcome = Outcome()
        self.streamers: dict[str, SimStreamer] = {}
        self.engines: dict[str, Engine] = {}
        for name in ENGINES + TOKENIZERS + STREAMERS:
            self.start(name)
        self.cursor, self.accepted, self.done = "", False, False
        self.got: list[list[int]] = [[] for _ in range(self.choices)]
        self.finished: set[int] = set()
        self.request = "0"
        self.open()

    def start(self, name: str, crashed: bool = False) -> None:
        process = self.kernel.crash(name) if crashed else self.kernel.process(name)
        if name in ENGINES:
            self.engines[name] = Engine(self.kernel, process, self.tokens)
        elif name in TOKENIZERS:
            process.start(tokenizer(self.kernel, process))
        else:
            self.streamers[name] = SimStreamer(self.kernel, process, "p" if name == "s0" else f"p-{name}")

    # -- the client ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Ask; again, by another name, if the streamer dies before it has accepted."""
        self.request = str(int(self.request) + 1)
        self.socket = Socket(self.streamers["s0"])
        self.kernel.processes["s0"].start(self.socket.open(new_record(self.request, self.length, self.choices)))

    def move(self, close: bool) -> None:
        """To a new socket, on either streamer; the old one is closed, or hangs half-open."""
        if not self.accepted:
            return
        session = self.socket.session
        if close and session is not None:
            self.socket.streamer.detach(session)
        name = self.random.choice(STREAMERS)
        self.socket = Socket(self.streamers[name])
        self.kernel.processes[name].start(self._later(self.socket))

    async def _later(self, socket: Socket) -> None:
        """A client may take its time to come back."""
        await self.kernel.sleep(self.random.choice((0, 0, 500, 5000)))
        await socket.resume(self.request, self.cursor)

    def listen(self) -> None:
        """Read one frame, as far as there is one."""
        conflicts = (session for streamer in self.streamers.values() for session in streamer.conflicts)
        ours = self.socket.session  # one that the client has left may have followed an attempt that a later one replaced
        if not self.loss and not self._twice() and any(session is ours for session in conflicts):
            self.violate("conflict though the broker lost nothing")
        socket, session = self.socket, self.socket.session
        self.accepted = self.accepted or session is not None
        frame = socket.read()
        if frame is not None:
            delta, self.cursor, ids = frame
            self.take(delta.choice, delta.first, ids)
            if delta.finish:
                self.finished.add(delta.choice)
        elif socket.error is not None:
            self.refuse(socket.error.code)
        elif session is not None and session.done and not session.stopped:
            self.end(session.counts)

    def _twice(self) -> bool:
        """A submission whose answer was lost is sent again: then two attempts begin at the start, and may differ."""
        return len(self.tokens.anew) > 1

    def take(self, choice: int, first: int, ids: list[int]) -> None:
        got = self.got[choice]
        if first != len(got):
            self.violate(f"token {first} of choice {choice} came after {len(got)}")
        for id in ids:
            if not self.tokens.follows(id, choice, got[-1] if got else root(self.request)):
                self.violate("splice")
            got.append(id)

    def refuse(self, code: str) -> None:
        if code == "stream_lost":
            self.outcome.lost, self.done = True, True
            if not self.loss:
                self.violate("lost a stream though the broker lost nothing")
        elif code == "superseded":  # by an earlier attempt of our own that came late: resume again
            self.outcome.superseded += 1
            self.move(close=False)
        else:
            self.violate(f"error {code}")

    def end(self, counts: list[int]) -> None:
        self.done = True
        if counts != [len(got) for got in self.got]:
            self.violate("usage")
        if any(len(got) < self.length and got[-1:] != [1] for got in self.got):
            self.violate("ended early")

    def violate(self, why: str) -> None:
        self.outcome.violation = self.outcome.violation or why
        self.done = True

    # -- faults ----------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        kinds = [self._crash, self._crash, self._pause, self._pause, self._move, self._restart]
        kind = self.random.choice(kinds)
        name = kind.__name__.lstrip("_")
        self.outcome.faults[name] = self.outcome.faults.get(name, 0) + 1
        kind()

    def _victim(self) -> str:
        """Often the engine that has the request."""
        busy = [name for name, engine in self.engines.items() if engine.jobs]
        return self.random.choice(busy if busy and self.random.random() < 0.5 else ENGINES + TOKENIZERS + STREAMERS)

    def _crash(self) -> None:
        name = self._victim()
        self.start(name, crashed=True)
        if name == self.socket.streamer.process.name:
            if self.accepted:
                self.move(close=False)
            else:
                self.open()  # nothing was accepted: the client asks again

    def _pause(self) -> None:
        name = self._victim()
        self.kernel.pause(name, self.random.choice((100, 1000, 4000, 8000)))

    def _move(self) -> None:
        self.move(close=self.random.random() < 0.5)

    def _restart(self) -> None:
        """Without its last writes, or empty, or flushed; an empty one may have another clock."""
        broker, lost = self.kernel.broker, self.random.choice((0, 0, 1, 2, 3, 5, 8, 1 << 30)) if self.loss else 0
        if self.loss and self.random.random() < 0.1:
            broker.flush()
            return
        broker.restart(lost, shift=self.random.choice((0, -100_000, 100_000)) if lost > 100 else 0)
        self.kernel.break_connections()

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        started = self.kernel.now
        while not self.done:
            age = self.kernel.now - started
            if age < FAULTS_UNTIL_MS and self.random.random() < self.rate:
                self.fault()
            try:
                self.kernel.step()
            except (LookupError, ValueError, TypeError, AttributeError, Refused) as error:
                self.violate(f"{type(error).__name__}: {error}")
            if self.random.random() < 0.4:
                self.listen()
            if age > STUCK_AFTER_MS:
                self.violate("stall")
        self.outcome.took_ms = self.kernel.now - started
        self.outcome.wasted = max(self.tokens.drawn - sum(map(len, self.got)), 0)
        self.kernel.close()
        return self.outcome


class _Clock:
    def __init__(self) -> None:
        self.kernel: Kernel | None = None

    def time(self) -> float:
        assert self.kernel is not None
        return self.kernel.now / 1000

    monotonic = time


def run(seed: int, loss: bool | None = None) -> Outcome:
    """The schedule of a seed; every other one has a broker that loses nothing."""
    clock = _Clock()
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch(f"services.streamer.{module}.time", clock))
        stack.enter_context(patch("shared.readers.time", clock))
        stack.enter_context(patch("services.streamer.session.TextStream", Text))
        schedule = Schedule(seed, bool(seed % 2) if loss is None else loss)
        clock.kernel = schedule.kernel
        return schedule.run()
