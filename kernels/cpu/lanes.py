"""What several CPU kernels do with a vector's lanes."""

import math

from kernels.cpu.jit import F32, I32, Function, Value, every, number, vector

LOG2E = math.log2(math.e)
POWER = [math.log(2) ** k / math.factorial(k) for k in range(6, -1, -1)]  # of 2, as a polynomial in -1/2..1/2: to 1e-7


def sum_of(fn: Function, x: Value) -> Value:
    """Of all lanes [power of two], by halves: always in the same order."""
    count = x.type.count
    while count > 1:
        count //= 2
        low, high = (vector(I32, count)(list(range(first, first + count))) for first in (0, count))
        x = fn.build.fadd(fn.build.shuffle_vector(x, x, low), fn.build.shuffle_vector(x, x, high))
    return fn.build.extract_element(x, number(0, I32))


def power_of_two(fn: Function, x: Value) -> Value:
    """2^x in each lane, x cut to -126..126: the exponent of the whole part, times a polynomial of the rest."""
    build, count = fn.build, x.type.count
    inside = fn.same("maxnum", fn.same("minnum", x, every(F32, 126.0, count)), every(F32, -126.0, count))
    whole = fn.same("nearbyint", inside)
    rest = build.fsub(inside, whole)
    power = every(F32, POWER[0], count)
    for factor in POWER[1:]:
        power = fn.same("fma", power, rest, every(F32, factor, count))
    exponent = build.add(build.fptosi(whole, vector(I32, count)), every(I32, 127, count))
    return build.fmul(power, build.bitcast(build.shl(exponent, every(I32, 23, count)), vector(F32, count)))
