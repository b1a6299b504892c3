"""How a group's weights lie in memory, and how they meet a group's rounded columns: what differs between GGUF's forms.

four   codes 0..15, scale and floor float16: Q4_0 and Q4_1 as they are
eight  codes -127..127, scale float32, no floor: Q8_0 as it is

A tile's outputs are one for each lane of a register: 16 where the processor multiplies and adds words in one instruction
(AVX-512 VNNI), else 8.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from kernels.cpu.jit import F16, F32, I8, I16, I32, Function, Value, every, has, vector
from kernels.cpu.rounded import GROUP

WIDE, NARROW = 16, 8  # lanes


@dataclass(frozen=True)
class Format:
    """How a group's weights [lanes outputs] and a group's rounded columns lie in memory, in bytes, and how they meet."""

    lanes: int
    weight_bytes: int
    dot: Callable[[Function, Value, list[Value]], list[Value]]  # weights, rows' columns -> int32 [lanes] for each row
    scaled: Callable[[Function, Value, Value, Value, Value, Value], Value]  # weights, dot, scale, sum, y -> more y

    @property
    def rows(self) -> int:
        """Rows that share one reading of a tile: as many as registers hold the sums of."""
        return self.lanes // 2


def widest() -> int:
    return WIDE if has("avx512vnni", "avx512bw") else NARROW


@functools.cache
def four(lanes: int) -> Format:
    """A word holds four codes of a lane, two columns apart."""
    halves, floats, words = vector(F16, lanes), vector(F32, lanes), vector(I16, 2 * lanes)

    def dot(fn: Function, weights: Value, rows: list[Value]) -> list[Value]:
        sums: list[Value] = [every(I32, 0, lanes)] * len(rows)
        for pair in range(GROUP // 2):
            packed = fn.load(weights, 4 * lanes * (pair // 4), words)
            codes = fn.build.and_(fn.build.lshr(packed, every(I16, 4 * (pair % 4), 2 * lanes)), every(I16, 15, 2 * lanes))
            _add_pair(fn, sums, codes, rows, pair)
        return sums

    def scaled(fn: Function, weights: Value, dot: Value, scale: Value, total: Value, y: Value) -> Value:
        scales, floors = (fn.build.fpext(fn.load(weights, at * lanes, halves), floats) for at in (16, 18))
        return fn.same("fma", total, floors, fn.same("fma", fn.build.fmul(dot, scale), scales, y))

    return Format(lanes, 20 * lanes, dot, scaled)


@functools.cache
def eight(lanes: int) -> Format:
    def dot(fn: Function, weights: Value, rows: list[Value]) -> list[Value]:
        sums: list[Value] = [every(I32, 0, lanes)] * len(rows)
        for pair in range(GROUP // 2):
            codes = fn.build.sext(fn.load(weights, 2 * lanes * pair, vector(I8, 2 * lanes)), vector(I16, 2 * lanes))
            _add_pair(fn, sums, codes, rows, pair)
        return sums

    def scaled(fn: Function, weights: Value, dot: Value, scale: Value, _total: Value, y: Value) -> Value:
        return fn.same("fma", fn.build.fmul(dot, scale), fn.load(weights, 32 * lanes, vector(F32, lanes)), y)

    return Format(lanes, 36 * lanes, dot, scaled)


def _add_pair(fn: Function, sums: list[Value], codes: Value, rows: list[Value], pair: int) -> None:
    """Two columns' products: codes int16 [lanes * 2]."""
    lanes = codes.type.count // 2
    for at, row in enumerate(rows):
        if lanes == WIDE:
            sums[at] = fn.machine(f"vpdpwssd {4 * pair}($3){{1to16}}, $2, $0", "=v,0,v,r", sums[at], codes, row)
        else:
            columns = fn.build.bitcast(fn.spread(fn.load(row, 4 * pair, I32), lanes), codes.type)
            sums[at] = fn.build.add(sums[at], fn.call("llvm.x86.avx2.pmadd.wd", vector(I32, lanes), codes, columns))
