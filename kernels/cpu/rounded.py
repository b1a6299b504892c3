"""What comes before a linear layer on the CPU, and the rounding of its columns for products of integers.

Columns are rounded in groups of 32, each with a scale (its largest is 32767 steps) and its sum, as they lie in memory:

    codes int16 [32], scale float32, sum float32
"""

from typing import Literal

from kernels.cpu.jit import F32, I16, I32, I64, POINTER, Function, Value, every, number, real, vector

GROUP = 32
LIMIT = 32767
Before = Literal["plain", "norm", "gate"]
WHOLE = vector(F32, GROUP)
POWER = (  # of 2, as a polynomial: ln(2)^k / k!, the highest first
    0.00015403530393381606, 0.0013333558146428441, 0.009618129107628477, 0.05550410866482158, 0.24022650695910072,
    0.6931471805599453, 1.0,
)  # fmt: skip


SCALE_AT = 2 * GROUP
ROUNDED_BYTES = SCALE_AT + 8  # of a group: codes, scale, sum


def _round(fn: Function, x: Value, target: Value) -> None:
    """One group x [32 float32]: codes, scale, sum. A NaN or an infinity makes the scale NaN, and with it the whole row."""
    build = fn.build
    largest = fn.call("llvm.vector.reduce.fmax.v32f32", F32, fn.same("fabs", x))
    total = _sum(fn, x)
    limit = real(LIMIT)
    inverse = build.select(build.fcmp_ordered(">", largest, real(0.0)), build.fdiv(limit, largest), real(0.0))
    steps = fn.same("nearbyint", build.fmul(x, fn.spread(inverse, GROUP)))
    fn.store(build.trunc(build.fptosi(steps, vector(I32, GROUP)), vector(I16, GROUP)), target, 0)
    sound = build.fmul(total, real(0.0))
    fn.store(build.fadd(build.fdiv(largest, limit), sound), target, SCALE_AT)
    fn.store(total, target, SCALE_AT + 4)


def _sum(fn: Function, x: Value) -> Value:
    """In halves, which is a fixed order."""
    build, count = fn.build, GROUP
    while count > 1:
        count //= 2
        low, high = (vector(I32, count)(list(range(first, first + count))) for first in (0, count))
        x = build.fadd(build.shuffle_vector(x, x, low), build.shuffle_vector(x, x, high))
    return build.extract_element(x, number(0, I32))


def _silu(fn: Function, x: Value) -> Value:
    """x / (1 + 2^t), t = -x log2 e: 2^t is the exponent of t's whole part times a polynomial of the rest."""
    build = fn.build
    turned = build.fmul(x, every(F32, -1.4426950408889634, GROUP))
    inside = fn.same("maxnum", fn.same("minnum", turned, every(F32, 126.0, GROUP)), every(F32, -126.0, GROUP))
    whole = fn.same("nearbyint", inside)
    rest = build.fsub(inside, whole)
    power = every(F32, POWER[0], GROUP)
    for factor in POWER[1:]:
        power = fn.same("fma", power, rest, every(F32, factor, GROUP))
    exponent = build.shl(build.add(build.fptosi(whole, vector(I32, GROUP)), every(I32, 127, GROUP)), every(I32, 23, GROUP))
    return build.fdiv(x, fn.same("fma", power, build.bitcast(exponent, WHOLE), every(F32, 1.0, GROUP)))


def prepare(module: Value, before: Before) -> None:
    """prepare(x, extra, rounded, groups, eps): one row of x; `extra` are the norm's weights."""
    fn = Function(module, "prepare", [POINTER] * 3 + [I64, F32])
    x, extra, rounded, groups, eps = fn.arguments
    build, factor = fn.build, None
    if before == "norm":
        [squares] = fn.loop(groups, lambda at, sums: [_squares(fn, x, at, sums[0])], [every(F32, 0.0, GROUP)])
        columns = build.sitofp(fn.times(groups, GROUP), F32)
        mean = build.fadd(build.fdiv(_sum(fn, squares), columns), eps)
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
