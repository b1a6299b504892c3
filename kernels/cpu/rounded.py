"""What comes before a linear layer on the CPU, and the rounding of its columns for products of integers.

Columns are rounded in groups of 32, each with a scale (its largest is 32767 steps) and its sum, as they lie in memory:

    codes int16 [32], scale float32, sum float32
"""

from typing import Literal

from kernels.cpu.jit import F32, I16, I32, I64, POINTER, Function, Value, every, real, vector
from kernels.cpu.lanes import LOG2E, power_of_two, sum_of

GROUP = 32
LIMIT = 32767
Before = Literal["plain", "norm", "gate"]
WHOLE = vector(F32, GROUP)
SCALE_AT = 2 * GROUP
ROUNDED_BYTES = SCALE_AT + 8  # of a group: codes, scale, sum


def _round(fn: Function, x: Value, target: Value) -> None:
    """One group x [32 float32]: codes, scale, sum. A NaN or an infinity makes the scale NaN, and with it the whole row."""
    build = fn.build
    largest = fn.call("llvm.vector.reduce.fmax.v32f32", F32, fn.same("fabs", x))
    total = sum_of(fn, x)
    limit = real(LIMIT)
    inverse = build.select(build.fcmp_ordered(">", largest, real(0.0)), build.fdiv(limit, largest), real(0.0))
    steps = fn.same("nearbyint", build.fmul(x, fn.spread(inverse, GROUP)))
    fn.store(build.trunc(build.fptosi(steps, vector(I32, GROUP)), vector(I16, GROUP)), target, 0)
    sound = build.fmul(total, real(0.0))
    fn.store(build.fadd(build.fdiv(largest, limit), sound), target, SCALE_AT)
    fn.store(total, target, SCALE_AT + 4)


def _silu(fn: Function, x: Value) -> Value:
    """x / (1 + 2^(-x log2 e))"""
    power = power_of_two(fn, fn.build.fmul(x, every(F32, -LOG2E, GROUP)))
    return fn.build.fdiv(x, fn.build.fadd(power, every(F32, 1.0, GROUP)))


def prepare(module: Value, before: Before) -> None:
    """prepare(x, extra, rounded, groups, eps): one row of x; `extra` are the norm's weights."""
    fn = Function(module, "prepare", [POINTER] * 3 + [I64, F32])
    x, extra, rounded, groups, eps = fn.arguments
    build, factor = fn.build, None
    if before == "norm":
        [squares] = fn.loop(groups, lambda at, sums: [_squares(fn, x, at, sums[0])], [every(F32, 0.0, GROUP)])
        columns = build.sitofp(fn.times(groups, GROUP), F32)
        mean = build.fadd(build.fdiv(sum_of(fn, squares), columns), eps)
        factor = fn.spread(build.fdiv(real(1.0), fn.same("sqrt", mean)), GROUP)

    def group(at: Value, _: list[Value]) -> None:
        here = fn.times(at, 4 * GROUP)
        value = fn.load(x, here, WHOLE)
        if factor is not None:
            value = build.fmul(build.fmul(value, factor), fn.load(extra, here, WHOLE))
        elif before == "gate":
            up = fn.load(x, build.add(here, fn.times(groups, 4 * GROUP)), WHOLE)
            value = build.fmul(_silu(fn, value), up)
        _round(fn, value, fn.at(rounded, fn.times(at, ROUNDED_BYTES)))

    fn.loop(groups, group)
    build.ret_void()


def _squares(fn: Function, x: Value, at: Value, total: Value) -> Value:
    value = fn.load(x, fn.times(at, 4 * GROUP), WHOLE)
    return fn.same("fma", value, value, total)
