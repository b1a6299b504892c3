"""Threads that work together on a kernel's items, made for cores that other processes want too.

A kernel is one or two phases of items; all of a phase are done before the next begins. Items are claimed one by one, and nobody
waits for a thread that has claimed none: if the system has taken a helper's core away, the caller does its items. (OpenMP's
barriers wait for every thread: beside a busy streamer on two cores a step took a time slice per barrier.) Between the kernels
of a step helpers spin; after a third of a millisecond without work they sleep, until the next kernel wakes them.

Kernels that follow each other are one program and one call, without Python between them: meanwhile other threads have the
interpreter.

What is left of a phase is one 64-bit word, its number above and the count of unclaimed items below: a claim is a
compare-and-swap, so a helper that comes late cannot claim from a phase that it has not seen.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.jit import I1, I32, I64, POINTER, VOID, Function, Module, Value, compile, function_type, number, pointer_to

PATIENCE = 1_000_000  # ticks of the processor's clock, a third of a millisecond or so, before a helper goes to sleep
GOODBYES = 100  # pauses, some microseconds, in which it may still be called back
ITEM = function_type(POINTER, I64)  # what a phase's item is done by: (call, item)


class Board(ctypes.Structure):
    """What the threads share. `word` is on a line of its own."""

    _fields_ = (
        ("word", ctypes.c_int64),
        ("_apart", ctypes.c_int64 * 7),
        ("left", ctypes.c_int64),  # items that are not done
        ("phase", ctypes.c_void_p),
        ("call", ctypes.c_void_p),
        ("serving", ctypes.c_int64),  # helpers that are not asleep
        ("calls", ctypes.c_int64),  # of the caller, twice: odd while one is under way
    )


class Order(ctypes.Structure):
    """One kernel: what its threads are told, and two phases, each the address of its function and the count of its items."""

    _fields_ = (
        ("call", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first", "first_items", "second", "second_items")),
    )


WORD, LEFT, PHASE, CALL, SERVING, CALLS = (
    getattr(Board, name).offset for name in ("word", "left", "phase", "call", "serving", "calls")
)


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
        _await(fn, board)
    fn.build.ret_void()


def _march(module: Value) -> None:
    """march(board, orders, count): lead them all."""
    fn = Function(module, "march", [POINTER, POINTER, I64])
    board, orders, count = fn.arguments

    def order(at: Value, _: list[Value]) -> None:
        here = fn.at(orders, fn.times(at, ctypes.sizeof(Order)))
        fn.call("lead", VOID, board, fn.load(here, 0, POINTER), *(fn.load(here, 8 * field, I64) for field in range(1, 5)))

    fn.loop(count, order)
    fn.build.ret_void()


def _await(fn: Function, board: Value) -> None:
    """Until what others have claimed is done. Without offering our core: a busy one would keep it, and all wait for us."""

    def look(_: list[Value]) -> tuple[list[Value], Value]:
        fn.call("llvm.x86.sse2.pause", VOID)
        return [], fn.build.icmp_signed(">", fn.load_shared(board, LEFT), number(0))

    fn.repeat(look)


def _serve(module: Value) -> None:
    """serve(board): help until there has been nothing to do for a while."""
    fn = Function(module, "serve", [POINTER])
    build, [board] = fn.build, fn.arguments

    def pause(_: Value, __: list[Value]) -> None:
        fn.call("llvm.x86.sse2.pause", VOID)

    def stay(_: list[Value]) -> tuple[list[Value], Value]:
        build.atomic_rmw("add", fn.at(board, SERVING), number(1), "seq_cst")
        calls = _idle(fn, board)
        build.atomic_rmw("sub", fn.at(board, SERVING), number(1), "seq_cst")
        # A caller who saw us here has not woken us. It said so before it looked: give its word the time to arrive.
        fn.loop(number(GOODBYES), pause)
        return [], build.icmp_signed("!=", fn.load_shared(board, CALLS), calls)

    fn.repeat(stay)
    build.ret_void()


def _idle(fn: Function, board: Value) -> Value:
    """Help until no call has been under way for a while; how many there were by then.

    Whoever waits for this core gets it here, where no item is claimed: taken in the midst of one, it is missed by all.

    Never while one is: if the system takes the caller's core away for a moment, nothing seems to happen, and who fell asleep
    then would be missed until the next call.
    """
    build = fn.build

    def look(last: list[Value]) -> tuple[list[Value], Value]:
        word, calls, since = last
        fn.call("work", VOID, board)
        fn.call("sched_yield", I32)
        now, seen, called = fn.call("llvm.readcyclecounter", I64), fn.load_shared(board, WORD), fn.load_shared(board, CALLS)
        same = build.and_(build.icmp_signed("==", seen, word), build.icmp_signed("==", called, calls))
        since = build.select(same, since, now)
        soon = build.icmp_signed("<", build.sub(now, since), number(PATIENCE))
        return [seen, called, since], build.or_(soon, build.trunc(called, I1))

    return fn.repeat(look, [number(-1), number(-1), number(0)])[1]


@functools.cache
def _compiled() -> tuple[Callable[..., None], Callable[[int], None]]:
    module = Module("team")
    _work(module)
    _lead(module)
    _march(module)
    _serve(module)
    address = compile(module)
    march = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, ctypes.c_int64)(address("march"))
    return march, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address("serve"))


class Team:
    """The caller and its helpers. One caller at a time."""

    def __init__(self) -> None:
        self.board = Board()
        self.at = ctypes.addressof(self.board)
        self.march, self.serve = _compiled()
        self.bells: list[threading.Event] = []

    def run(self, orders: "ctypes.Array[Order]") -> None:
        """One after the other, by as many threads as torch has."""
        helpers = torch.get_num_threads() - 1
        self.board.calls += 1  # first: who is about to fall asleep looks once more
        if self.board.serving < helpers:
            self._wake(helpers)
        self.march(self.at, ctypes.addressof(orders), len(orders))
        self.board.calls += 1

    def _wake(self, helpers: int) -> None:
        while len(self.bells) < helpers:
            self.bells.append(threading.Event())
            threading.Thread(target=self._help, args=(self.bells[-1],), name="helper", daemon=True).start()
        for bell in self.bells[:helpers]:
            bell.set()

    def _help(self, bell: threading.Event) -> None:
        while True:
            bell.wait()
            bell.clear()
            self.serve(self.at)


@functools.cache
def team() -> Team:
    return Team()


@dataclass(frozen=True)
class Task:
    """An order with the memory it points at."""

    call: ctypes.Structure
    first: tuple[int, int]
    second: tuple[int, int]
    kept: tuple[Tensor | ctypes.Structure, ...]

    @property
    def order(self) -> Order:
        return Order(ctypes.addressof(self.call), *self.first, *self.second)


class Program:
    """Tasks that are done in one call, as often as one likes."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.orders = (Order * len(tasks))(*(task.order for task in tasks))

    def run(self) -> None:
        team().run(self.orders)
