"""Rotary embedding, the pages' new tokens, and paged attention of decode rows, in one call, on the CPU.

    qkv     float32 [tokens, heads + 2 kv_heads, head_dim]       rotated in place: pairs of neighbours, as complex numbers
    turn    float32 [tokens, head_dim / 2, 2]                    cosine and sine of each pair
    page    bfloat16 [blocks, block_size, 2 kv_heads, head_dim]  one layer: keys, then values; the new tokens are put in
    slots   int64 [tokens]                                       where: block * block_size + offset
    tables  int64 [rows, width]                                  the decode rows' blocks; these rows are the first tokens
    places  int64 [tokens]                                       positions: row r attends to places[r] + 1 tokens
    out     float32 [rows, heads, head_dim]                      softmax(q · K / sqrt(head_dim)) · V

First the tokens are turned and put away, one by one, then the rows' key heads are attended to, one by one.
Keys and values are read where they lie, up to each row's own length: nothing is gathered, padded or masked.
"""

import ctypes
import functools
import math

import torch
from torch import Tensor

from kernels.cpu.jit import (
    F32,
    I64,
    POINTER,
    VOID,
    Function,
    Module,
    Value,
    compile,
    every,
    number,
    real,
)
from kernels.cpu.lanes import LOG2E, power_of_two, sum_of
from kernels.cpu.pages import FLOATS, LANES, WIDE, Shape, at_once, each_token, from_bfloat, put
from kernels.cpu.team import Program, Task

HEADS = 4  # query heads that share a reading


# -- reference -------------------------------------------------------------------------------------------------------------


def reference(qkv: Tensor, turn: Tensor, page: Tensor, slots: Tensor, tables: Tensor, places: Tensor) -> Tensor:
    """In plain torch, row by row."""
    kv_heads = page.shape[2] // 2
    heads = qkv.shape[1] - 2 * kv_heads
    qk = qkv[:, : heads + kv_heads]
    torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(turn).unsqueeze(1))
    page.flatten(0, 1)[slots] = qkv[:, heads:].to(page.dtype)
    rows = []
    for row, table in enumerate(tables):
        both = page[table].flatten(0, 1)[: places[row] + 1].float()  # [length, 2 * kv_heads, head_dim]
        keys, values = (part.repeat_interleave(heads // kv_heads, 1) for part in both.split(kv_heads, 1))
        scores = torch.einsum("hd,lhd->hl", qkv[row, :heads], keys) / math.sqrt(qkv.shape[2])
        rows.append(torch.einsum("hl,lhd->hd", scores.softmax(1), values))
    return torch.stack(rows)


# -- kernel ----------------------------------------------------------------------------------------------------------------


def _attend(module: Value, shape: Shape) -> None:
    """attend(queries, page, table, length, out, scratch): the query heads of one key head, whose keys `page` points at."""
    fn = Function(module, "attend", [POINTER] * 3 + [I64] + [POINTER] * 2)
    queries, page, table, length, out, scratch = fn.arguments
    line = fn.times(fn.build.add(length, number(LANES)), 4)  # of scratch, for one head
    for first in range(0, shape.group, HEADS):
        count, here = min(HEADS, shape.group - first), 4 * first * shape.head_dim
        lines = [fn.at(scratch, fn.times(line, head)) for head in range(count)]
        largest = _scores(fn, shape, fn.at(queries, here), page, table, length, lines)
        totals = [_weights(fn, line, length, most) for line, most in zip(lines, largest, strict=True)]
        _values(fn, shape, page, table, length, lines, totals, fn.at(out, here))
    fn.build.ret_void()


def _scores(
    fn: Function, shape: Shape, queries: Value, page: Value, table: Value, length: Value, lines: list[Value]
) -> list[Value]:
    """Into `lines`, in powers of two; the answer is each head's largest."""
    build, scale = fn.build, real(LOG2E / math.sqrt(shape.head_dim))
    for line in lines:
        fn.store(every(F32, -math.inf, LANES), line, fn.times(length, 4))  # behind the last, up to a whole register

    def token(at: Value, key: Value, largest: list[Value]) -> list[Value]:
        sums = [every(F32, 0.0, LANES)] * len(lines)
        for part in range(0, shape.head_dim, LANES):
            keys = from_bfloat(fn, key, 2 * part)
            for head in range(len(lines)):
                sums[head] = fn.same("fma", keys, fn.load(queries, 4 * (head * shape.head_dim + part), FLOATS), sums[head])
        scores = [build.fmul(sum_of(fn, total), scale) for total in sums]
        for line, score in zip(lines, scores, strict=True):
            fn.store(score, line, fn.times(at, 4))
        return [fn.same("maxnum", most, score) for most, score in zip(largest, scores, strict=True)]

    return each_token(fn, shape, page, table, length, token, [real(-math.inf)] * len(lines), 2 * shape.head_dim)


def _weights(fn: Function, line: Value, length: Value, largest: Value) -> Value:
    """Scores -> weights, in place; the answer is their sum."""
    most = fn.spread(largest, LANES)

    def some(at: Value, totals: list[Value]) -> list[Value]:
        weights = power_of_two(fn, fn.build.fsub(fn.load(line, fn.times(at, 4), FLOATS), most))
        fn.store(weights, line, fn.times(at, 4))
        return [fn.build.fadd(totals[0], weights)]

    [total] = fn.loop(length, some, [every(F32, 0.0, LANES)], step=LANES)
    return sum_of(fn, total)


def _values(
    fn: Function, shape: Shape, page: Value, table: Value, length: Value, lines: list[Value], totals: list[Value], out: Value
) -> None:
    page = fn.at(page, shape.kv_heads * shape.head_dim * 2)  # values lie behind the keys
    wide = next(wide for wide in (shape.head_dim, 32, WIDE) if len(lines) * wide <= at_once() and not shape.head_dim % wide)
    for part in range(0, shape.head_dim, wide):

        def token(at: Value, here: Value, sums: list[Value]) -> list[Value]:
            parts = [from_bfloat(fn, here, 2 * half) for half in range(0, wide, LANES)]
            weights = [fn.spread(fn.load(line, fn.times(at, 4), F32), LANES) for line in lines]
            pairs = [(weight, part) for weight in weights for part in parts]
            return [fn.same("fma", *pair, total) for pair, total in zip(pairs, sums, strict=True)]

        zeros = [every(F32, 0.0, LANES)] * (len(lines) * wide // LANES)
        found = each_token(fn, shape, fn.at(page, 2 * part), table, length, token, zeros, 2 * wide)
        for at, total in enumerate(found):
            head, half = divmod(at, wide // LANES)
            mean = fn.build.fdiv(total, fn.spread(totals[head], LANES))
            fn.store(mean, out, 4 * (head * shape.head_dim + part + half * LANES))


class Shared(ctypes.Structure):
    """What all layers of a step are told."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("turn", "slots", "tables", "places", "scratch")),
        *((name, ctypes.c_int64) for name in ("width", "scratch_bytes")),
    )


class Call(ctypes.Structure):
    """What a layer's threads are told."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("qkv", "page", "out", "shared"))


def _phases(module: Value, shape: Shape) -> None:
    """place(call, token), then answer(call, unit): one key head of one row."""
    head_bytes, row_bytes = 4 * shape.head_dim, 4 * shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    fn = Function(module, "place", [POINTER, I64])
    call, token = fn.arguments
    qkv, page, _, shared = (fn.load(call, 8 * at, POINTER) for at in range(4))
    turn, slots = (fn.load(shared, 8 * at, POINTER) for at in range(2))
    target = fn.at(page, fn.times(fn.load(slots, fn.times(token, 8), I64), shape.token_bytes))
    fn.call("put", VOID, fn.at(qkv, fn.times(token, row_bytes)), fn.at(turn, fn.times(token, head_bytes)), target)
    fn.build.ret_void()

    fn = Function(module, "answer", [POINTER, I64])
    (call, unit), build = fn.arguments, fn.build
    qkv, page, out, shared = (fn.load(call, 8 * at, POINTER) for at in range(4))
    tables, places, scratch = (fn.load(shared, 8 * at, POINTER) for at in range(2, 5))
    width, scratch_bytes = (fn.load(shared, 8 * at, I64) for at in (5, 6))
    row, head = build.sdiv(unit, number(shape.kv_heads)), build.srem(unit, number(shape.kv_heads))
    heads = fn.times(head, shape.group * head_bytes)
    queries = fn.at(qkv, build.add(fn.times(row, row_bytes), heads))
    target = fn.at(out, build.add(fn.times(row, shape.heads * head_bytes), heads))
    table, mine = fn.at(tables, fn.times(build.mul(row, width), 8)), fn.at(scratch, build.mul(unit, scratch_bytes))
    length = build.add(fn.load(places, fn.times(row, 8), I64), number(1))
    fn.call("attend", VOID, queries, fn.at(page, fn.times(head, 2 * shape.head_dim)), table, length, target, mine)
    build.ret_void()


@functools.cache
def _compiled(shape: Shape) -> tuple[int, int]:
    """The addresses of the two phases."""
    module = Module("decode")
    put(module, shape)
    _attend(module, shape)
    _phases(module, shape)
    address = compile(module)
    return address("place"), address("answer")


# -- launcher --------------------------------------------------------------------------------------------------------------


class Step:
    """What all layers of one step share. `width` blocks a row; `longest` tokens the longest row attends to."""

    def __init__(
        self, shape: Shape, turn: Tensor, slots: Tensor, tables: Tensor, places: Tensor, rows: int, longest: int
    ) -> None:
        scratch_bytes = 4 * HEADS * (longest + LANES) + 64  # of a row's key head
        self.shape, self.tokens, self.rows = shape, len(slots), rows
        scratch = torch.empty(rows * shape.kv_heads * scratch_bytes, dtype=torch.uint8)
        self.kept = (turn, slots, tables, places, scratch)
        pointers = dict(zip(("turn", "slots", "tables", "places", "scratch"), (t.data_ptr() for t in self.kept), strict=True))
        self.shared = Shared(width=len(tables) // max(rows, 1), scratch_bytes=scratch_bytes, **pointers)

    def __call__(self, qkv: Tensor, page: Tensor) -> Tensor:
        """[rows, heads * head_dim]; the pages then hold all tokens."""
        out = torch.empty(self.rows, self.shape.heads * self.shape.head_dim)
        Program([task(self.shape, qkv, page, out, self.shared)]).run()
        return out


def task(shape: Shape, qkv: Tensor, page: Tensor, out: Tensor, shared: Shared) -> Task:
    """One layer of whatever step `shared` tells of when it is done."""
    assert qkv.is_contiguous() and qkv.dtype == torch.float32 and page.dtype == torch.bfloat16 and out.is_contiguous()
    call = Call(qkv.data_ptr(), page.data_ptr(), out.data_ptr(), ctypes.addressof(shared))
    first, second = _compiled(shape)
    return Task(call, (first, len(qkv)), (second, len(out) * shape.kv_heads), (qkv, page, out, shared))
