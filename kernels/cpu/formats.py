"""How a group's weights lie in memory, and how they meet a group's rounded columns: what differs between GGUF's forms.

FOUR   codes 0..15, scale and floor float16: Q4_0 and Q4_1 as they are
EIGHT  codes -127..127, scale float32, no floor: Q8_0 as it is
"""

from collections.abc import Callable
from dataclasses import dataclass

from kernels.cpu.jit import F16, F32, I8, I16, I32, Function, Value, every, vector
from kernels.cpu.rounded import GROUP

LANES = 8  # outputs of a tile
FLOATS = vector(F32, LANES)


@dataclass(frozen=True)
class Format:
    """How a group's weights [8 outputs] and a group's rounded columns lie in memory, in bytes, and how they meet."""

    weight_bytes: int
    dot: Callable[[Function, Value, list[Value]], list[Value]]  # weights, rows' columns -> int32 [8] for each row
    scaled: Callable[[Function, Value, Value, Value, Value, Value], Value]  # weights, dot, scale, sum, y -> more y


def _dot4(fn: Function, weights: Value, rows: list[Value]) -> list[Value]:
    """A word holds four codes of a lane, two columns apart."""
    build, words = fn.build, vector(I16, 16)
    sums: list[Value] = [every(I32, 0, LANES)] * len(rows)
    for pair in range(GROUP // 2):
        four = fn.load(weights, 32 * (pair // 4), words)
        codes = build.and_(build.lshr(four, every(I16, 4 * (pair % 4), 16)), every(I16, 15, 16))
        _add_pair(fn, sums, codes, rows, pair)
    return sums


def _add_pair(fn: Function, sums: list[Value], codes: Value, rows: list[Value], pair: int) -> None:
    """Two columns' products: codes int16 [lanes * 2]."""
    for at, row in enumerate(rows):
        columns = fn.build.bitcast(fn.spread(fn.load(row, 4 * pair, I32), LANES), codes.type)
        sums[at] = fn.build.add(sums[at], fn.call("llvm.x86.avx2.pmadd.wd", vector(I32, LANES), codes, columns))


def _scaled4(fn: Function, weights: Value, dot: Value, scale: Value, total: Value, y: Value) -> Value:
    scales, floors = (fn.build.fpext(fn.load(weights, at, vector(F16, LANES)), FLOATS) for at in (128, 144))
    return fn.same("fma", total, floors, fn.same("fma", fn.build.fmul(dot, scale), scales, y))


def _dot8(fn: Function, weights: Value, rows: list[Value]) -> list[Value]:
    sums: list[Value] = [every(I32, 0, LANES)] * len(rows)
    for pair in range(GROUP // 2):
        codes = fn.build.sext(fn.load(weights, 16 * pair, vector(I8, 16)), vector(I16, 16))
        _add_pair(fn, sums, codes, rows, pair)
    return sums


def _scaled8(fn: Function, weights: Value, dot: Value, scale: Value, _total: Value, y: Value) -> Value:
    return fn.same("fma", fn.build.fmul(dot, scale), fn.load(weights, 256, FLOATS), y)


FOUR = Format(160, _dot4, _scaled4)
EIGHT = Format(288, _dot8, _scaled8)
