"""Pages of keys and values as the CPU kernels see them: where a token lies, and how a new one is put there.

page [blocks, block_size, 2 kv_heads, head_dim] bfloat16: one layer, a token's keys before its values
"""

from collections.abc import Callable
from dataclasses import dataclass

from kernels.cpu.jit import F32, I16, I32, I64, POINTER, Function, Value, every, has, number, vector

LANES, WIDE = 8, 16  # floats of a register; head dimensions summed at once
FLOATS = vector(F32, LANES)


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def fits(self) -> bool:
        return self.head_dim % WIDE == 0 and self.block_size & (self.block_size - 1) == 0

    @property
    def token_bytes(self) -> int:
        """Of a page."""
        return 2 * self.kv_heads * self.head_dim * 2


def at_once() -> int:
    """How many floats a kernel may sum at once: with AVX-512 there are twice as many registers."""
    return 24 * LANES if has("avx512vl") else 8 * LANES


def each_token(
    fn: Function,
    shape: Shape,
    page: Value,
    table: Value,
    length: Value,
    body: Callable[[Value, Value, list[Value]], list[Value]],
    carried: list[Value],
    size: int,
) -> list[Value]:
    """body(at, where `page` has it, carried) for each of `length` tokens, of which `size` bytes are wanted.

    Lines are too far apart for the processor to see where this leads, so those of the next block are asked for meanwhile.
    """
    build, shift = fn.build, shape.block_size.bit_length() - 1
    blocks = build.lshr(build.add(length, number(shape.block_size - 1)), number(shift))
    last = build.sub(blocks, number(1))

    def block_at(nth: Value) -> Value:
        return fn.at(page, fn.times(fn.load(table, fn.times(nth, 8), I64), shape.block_size * shape.token_bytes))

    def block(nth: Value, values: list[Value]) -> list[Value]:
        here, following = block_at(nth), build.add(nth, number(1))
        ahead = block_at(build.select(build.icmp_signed("<", nth, last), following, last))
        first = build.shl(nth, number(shift))
        rest = build.sub(length, first)
        count = build.select(build.icmp_signed("<", rest, number(shape.block_size)), rest, number(shape.block_size))

        def token(at: Value, inner: list[Value]) -> list[Value]:
            offset = fn.times(at, shape.token_bytes)
            for line in range(0, size, 64):
                fn.prefetch(fn.at(ahead, offset), line)
            return body(build.add(first, at), fn.at(here, offset), inner)

        return fn.loop(count, token, values)

    return fn.loop(blocks, block, carried)


def put(module: Value, shape: Shape) -> None:
    """put(qkv, turn, target): one token."""
    fn = Function(module, "put", [POINTER] * 3)
    qkv, turn, target = fn.arguments
    head_bytes, turned = 4 * shape.head_dim, shape.heads + shape.kv_heads
    fn.loop(number(turned), lambda head, _: _rotate(fn, fn.at(qkv, fn.times(head, head_bytes)), turn, shape.head_dim))
    source = fn.at(qkv, shape.heads * head_bytes)

    def narrow(at: Value, _: list[Value]) -> None:
        fn.store(_to_bfloat(fn, fn.load(source, fn.times(at, 4), FLOATS)), target, fn.times(at, 2))

    fn.loop(number(2 * shape.kv_heads * shape.head_dim), narrow, step=LANES)
    fn.build.ret_void()


def _rotate(fn: Function, head: Value, turn: Value, size: int) -> None:
    build = fn.build
    even, odd, swapped = (
        vector(I32, LANES)(order) for order in ([0, 0, 2, 2, 4, 4, 6, 6], [1, 1, 3, 3, 5, 5, 7, 7], [1, 0, 3, 2, 5, 4, 7, 6])
    )
    signs = FLOATS([-1.0, 1.0] * (LANES // 2))
    for at in range(0, 4 * size, 4 * LANES):
        x, angle = fn.load(head, at, FLOATS), fn.load(turn, at, FLOATS)
        cosine, sine = (build.shuffle_vector(angle, angle, order) for order in (even, odd))
        crossed = build.fmul(build.fmul(build.shuffle_vector(x, x, swapped), sine), signs)
        fn.store(build.fadd(build.fmul(x, cosine), crossed), head, at)


def _to_bfloat(fn: Function, x: Value) -> Value:
    """To the nearest, ties to even; a NaN stays one."""
    build = fn.build
    bits = build.bitcast(x, vector(I32, LANES))
    odd = build.and_(build.lshr(bits, every(I32, 16, LANES)), every(I32, 1, LANES))
    nearest = build.lshr(build.add(build.add(bits, every(I32, 0x7FFF, LANES)), odd), every(I32, 16, LANES))
    number_ = build.fcmp_ordered("ord", x, x)
    return build.trunc(build.select(number_, nearest, every(I32, 0x7FC0, LANES)), vector(I16, LANES))


def from_bfloat(fn: Function, base: Value, offset: int) -> Value:
    wide = fn.build.zext(fn.load(base, offset, vector(I16, LANES)), vector(I32, LANES))
    return fn.build.bitcast(fn.build.shl(wide, every(I32, 16, LANES)), FLOATS)
