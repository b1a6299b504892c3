"""Threads that work together on a kernel's items, made for cores that other processes want too.

A kernel is one or two phases of items; all of a phase are done before the next begins. Items are claimed one by one, and nobody
waits for a thread that has claimed none: if the system has taken a helper's core away, the caller does its items. (OpenMP's
barriers wait for every thread: beside a busy streamer on two cores a step took a time slice per barrier.) Between kernels
helpers spin, as long as somebody is `awake`; then they sleep.

What is left of a phase is one 64-bit word, its number above and the count of unclaimed items below: a claim is a
compare-and-swap, so a helper that comes late cannot claim from a phase that it has not seen.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kernels.cpu.jit import I64, POINTER, VOID, Function, Module, Value, compile, function_type, number, pointer_to

SPINS = 2000  # looks at the word before a helper offers its core to others
ITEM = function_type(POINTER, I64)  # what a phase's item is done by: (call, item)


class Board(ctypes.Structure):
    """What the threads share. `word` is on a line of its own."""

    _fields_ = (
        ("word", ctypes.c_int64),
        ("_apart", ctypes.c_int64 * 7),
        ("left", ctypes.c_int64),  # items that are not done
        ("phase", ctypes.c_void_p),
        ("call", ctypes.c_void_p),
        ("awake", ctypes.c_int64),
    )


WORD, LEFT, PHASE, CALL, AWAKE = (getattr(Board, name).offset for name in ("word", "left", "phase", "call", "awake"))


def _work(module: Value) -> None:
    """work(board): claim and do items until none is left."""
    fn = Function(module, "work", [POINTER])
    build, [board] = fn.build, fn.arguments
    look, claim, mine, out = (fn.value.append_basic_block() for _ in range(4))
    build.branch(look)
    build.position_at_end(look)
    word = fn.load_shared(board, WORD)
    unclaimed = build.and_(word, number((1 << 32) - 1))
    build.cbranch(build.icmp_signed(">", unclaimed, number(0)), claim, out)
    build.position_at_end(claim)
    won = build.cmpxchg(fn.at(board, WORD), word, build.sub(word, number(1)), "seq_cst", "seq_cst")
    build.cbranch(build.extract_value(won, 1), mine, look)
    build.position_at_end(mine)
    phase = build.inttoptr(fn.load(board, PHASE, I64), pointer_to(ITEM))
    build.call(phase, [fn.load(board, CALL, POINTER), build.sub(unclaimed, number(1))])
    build.atomic_rmw("sub", fn.at(board, LEFT), number(1), "seq_cst")
    build.branch(look)
    build.position_at_end(out)
    build.ret_void()


def _lead(module: Value) -> None:
    """lead(board, call, first, items, second, items): both phases, to their end."""
    fn = Function(module, "lead", [POINTER, POINTER, I64, I64, I64, I64])
    board, call, *phases = fn.arguments
    fn.store(call, board, CALL)
    for phase, count in (phases[:2], phases[2:]):
        fn.store(phase, board, PHASE)
        fn.store_shared(count, board, LEFT)
        number_ = fn.build.add(fn.build.lshr(fn.load_shared(board, WORD), number(32)), number(1))
        fn.store_shared(fn.build.or_(fn.build.shl(number_, number(32)), count), board, WORD)
        fn.call("work", VOID, board)
        fn.spin(lambda: fn.build.icmp_signed(">", fn.load_shared(board, LEFT), number(0)))
    fn.build.ret_void()


def _serve(module: Value) -> None:
    """serve(board): help until nobody is awake."""
    fn = Function(module, "serve", [POINTER])
    build, [board] = fn.build, fn.arguments

    def idle() -> Value:
        fn.call("work", VOID, board)
        return build.icmp_signed("!=", fn.load_shared(board, AWAKE), number(0))

    fn.spin(idle, SPINS)
    build.ret_void()


@functools.cache
def _compiled() -> tuple[Callable[..., None], Callable[[int], None]]:
    module = Module("team")
    _work(module)
    _lead(module)
    _serve(module)
    address = compile(module)
    lead = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4)(address("lead"))
    return lead, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address("serve"))


class Team:
    """The caller and its helpers. One caller at a time."""

    def __init__(self) -> None:
        self.board = Board()
        self.at = ctypes.addressof(self.board)
        self.lead, self.serve = _compiled()
        self.wake: list[threading.Event] = []

    def run(self, call: ctypes.Structure, first: tuple[int, int], second: tuple[int, int]) -> None:
        """Two phases, each the address of its function and the count of its items."""
        self.lead(self.at, ctypes.addressof(call), *first, *second)

    @contextmanager
    def awake(self, threads: int) -> Iterator[None]:
        """Helpers stand by: as many as there are threads beside the caller. Without this the caller works alone."""
        while len(self.wake) < threads - 1:
            self.wake.append(threading.Event())
            threading.Thread(target=self._help, args=(self.wake[-1],), name="helper", daemon=True).start()
        self.board.awake = 1
        for event in self.wake[: threads - 1]:
            event.set()
        try:
            yield
        finally:
            self.board.awake = 0

    def _help(self, wake: threading.Event) -> None:
        while True:
            wake.wait()
            wake.clear()
            self.serve(self.at)


@functools.cache
def team() -> Team:
    return Team()


@contextmanager
def awake() -> Iterator[None]:
    """As many threads as torch has work on what kernels run meanwhile."""
    with team().awake(torch.get_num_threads()):
        yield
