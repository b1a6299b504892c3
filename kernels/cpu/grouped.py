"""Products with weights in groups of 32 columns, as GGUF has them, on the CPU.

    y[r, o] (+)= sum over groups g of  scale[o, g] * (codes[o, g] · x'[r, g]) + floor[o, g] * sum(x'[r, g])

x' is x, or its RMS norm, or silu(x's first half) * x's second half: what comes before a linear layer is computed on the way.
It is rounded to 16 bits in groups of 32, so that the inner products are of integers, and exact. (With 8 bits, as llama.cpp has
them, they took two thirds of the time, and 36 of 565 recorded tokens turned.) Weights lie in tiles of outputs, one for each
lane of a register: no sum goes across lanes.

First the rows are rounded, one by one, then the tiles multiplied, some at a time. A row's result is the same, bit for bit,
whatever other rows there are.
"""

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.cpu import formats
from kernels.cpu.formats import Format
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
    vector,
)
from kernels.cpu.rounded import GROUP, ROUNDED_BYTES, SCALE_AT, Before, prepare
from kernels.cpu.team import Program, Task

SHARE = 96  # outputs that a thread claims at once
BAND = 64  # rows that all tiles of a share are multiplied with before the next: so many rounded rows stay in a core's cache
AHEAD = 4096  # bytes of weights that are asked for before they are needed


# -- reference -------------------------------------------------------------------------------------------------------------


def reference(weight: Tensor, x: Tensor, before: Before, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """In plain torch, without rounding. weight [outputs, columns] is dense."""
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * norm
    elif before == "gate":
        gate, up = x.chunk(2, dim=1)
        x = silu(gate) * up
    return x @ weight.t()


# -- kernel ----------------------------------------------------------------------------------------------------------------


def _strip(module: Value, form: Format, count: int) -> None:
    """strip(weights, rounded, y, groups, row bytes of rounded, of y, keep): one tile's outputs for `count` rows."""
    fn = Function(module, f"strip{count}", [POINTER] * 3 + [I64] * 4)
    weights, rounded, y, groups, row_bytes, y_bytes, keep = fn.arguments
    floats = vector(F32, form.lanes)
    rows = [fn.at(rounded, fn.times(row_bytes, row)) for row in range(count)]
    lines = [fn.at(y, fn.times(y_bytes, row)) for row in range(count)]

    def group(at: Value, sums: list[Value]) -> list[Value]:
        tile = fn.at(weights, fn.times(at, form.weight_bytes))
        for line in range(0, form.weight_bytes, 64):
            fn.prefetch(tile, AHEAD + line, near=False)
        here = [fn.at(row, fn.times(at, ROUNDED_BYTES)) for row in rows]
        dots = [fn.build.sitofp(dot, floats) for dot in form.dot(fn, tile, here)]
        scales, totals = ([fn.spread(fn.load(row, SCALE_AT + more, F32), form.lanes) for row in here] for more in (0, 4))
        return [form.scaled(fn, tile, *each) for each in zip(dots, scales, totals, sums, strict=True)]

    kept = fn.build.icmp_signed("!=", keep, number(0))
    first = [fn.build.select(kept, fn.load(line, 0, floats), every(F32, 0.0, form.lanes)) for line in lines]
    for total, line in zip(fn.loop(groups, group, first), lines, strict=True):
        fn.store(total, line, 0)
    fn.build.ret_void()


class Call(ctypes.Structure):
    """What a call's threads are told."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "extra", "rounded", "weights", "y")),
        *((name, ctypes.c_int64) for name in ("groups", "rows", "tiles", "x_bytes", "keep")),
        ("eps", ctypes.c_float),
    )


def _phases(module: Value, form: Format) -> None:
    """round(call, row), then multiply(call, share): SHARE outputs for all rows."""
    fn = Function(module, "round", [POINTER, I64])
    call, row = fn.arguments
    x, extra, rounded = (fn.load(call, 8 * at, POINTER) for at in range(3))
    groups, x_bytes, eps = fn.load(call, 40, I64), fn.load(call, 64, I64), fn.load(call, 80, F32)
    here, there = fn.at(x, fn.build.mul(row, x_bytes)), fn.at(rounded, fn.build.mul(row, fn.times(groups, ROUNDED_BYTES)))
    fn.call("prepare", VOID, here, extra, there, groups, eps)
    fn.build.ret_void()

    fn = Function(module, "multiply", [POINTER, I64])
    call, share = fn.arguments
    tiles, first = fn.load(call, 56, I64), fn.times(share, SHARE // form.lanes)
    last = fn.build.add(first, number(SHARE // form.lanes))
    last, rows = _least(fn, last, tiles), fn.load(call, 48, I64)

    def band(row: Value, _: list[Value]) -> None:
        count = _least(fn, fn.build.sub(rows, row), number(BAND))
        fn.loop(last, lambda tile, _: _tile(fn, form, call, tile, row, count), start=first)

    fn.loop(rows, band, step=BAND)
    fn.build.ret_void()


def _least(fn: Function, one: Value, other: Value) -> Value:
    return fn.build.select(fn.build.icmp_signed("<", one, other), one, other)


def _tile(fn: Function, form: Format, call: Value, tile: Value, start: Value, rows: Value) -> None:
    """One tile's outputs for `rows` rows from `start` on."""
    build = fn.build
    rounded, weights, y = (fn.load(call, 8 * at, POINTER) for at in range(2, 5))
    groups, tiles, keep = (fn.load(call, at, I64) for at in (40, 56, 72))
    row_bytes, y_bytes = fn.times(groups, ROUNDED_BYTES), fn.times(tiles, 4 * form.lanes)
    here, out = fn.at(weights, build.mul(tile, fn.times(groups, form.weight_bytes))), fn.at(y, fn.times(tile, 4 * form.lanes))

    def strip(count: int, row: Value) -> None:
        at = build.add(start, row)
        there, line = (fn.at(base, build.mul(at, size)) for base, size in ((rounded, row_bytes), (out, y_bytes)))
        fn.call(f"strip{count}", VOID, here, there, line, groups, row_bytes, y_bytes, keep)

    full = build.and_(rows, number(-form.rows))
    fn.loop(full, lambda row, _: strip(form.rows, row), step=form.rows)
    fn.choose(build.and_(rows, number(form.rows - 1)), range(1, form.rows), lambda count: strip(count, full))


@functools.cache
def _compiled(form: Format, before: Before) -> tuple[int, int]:
    """The addresses of the two phases."""
    module = Module("grouped")
    prepare(module, before)
    for count in range(1, form.rows + 1):
        _strip(module, form, count)
    _phases(module, form)
    address = compile(module)
    return address("round"), address("multiply")


# -- launcher --------------------------------------------------------------------------------------------------------------


class Grouped:
    """One matrix [outputs, columns], packed: outputs by lanes, columns by 32."""

    def __init__(self, form: Format, packed: Tensor) -> None:
        self.form, self.packed = form, packed
        self.tiles, self.groups = packed.shape[:2]
        self.outputs = self.tiles * form.lanes

    def __call__(
        self, x: Tensor, before: Before, y: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0
    ) -> Tensor:
        """x [rows, columns] float32 (twice the columns where `before` is "gate"); added to y, if there is one, in place."""
        out = torch.empty(len(x), self.outputs) if y is None else y
        Program([self.task(x, before, out, self.room(len(x)), y is not None, norm, eps)]).run()
        return out

    def room(self, rows: int) -> Tensor:
        """For the rounded columns of so many rows."""
        return torch.empty(rows * self.groups * ROUNDED_BYTES, dtype=torch.uint8)

    def task(self, x: Tensor, before: Before, y: Tensor, rounded: Tensor, keep: bool, norm: Tensor | None, eps: float) -> Task:
        """Into y, or added to what it holds if that is to be kept."""
        rows = len(x)
        assert x.dtype == torch.float32 and x.stride(1) == 1 and x.shape[1] == self.groups * GROUP * (1 + (before == "gate"))
        assert y.is_contiguous() and y.dtype == torch.float32 and y.shape == (rows, self.outputs)
        kept = (x, rounded, self.packed, y) if norm is None else (x, rounded, self.packed, y, norm)
        call = Call(
            x=x.data_ptr(), extra=None if norm is None else norm.data_ptr(), rounded=rounded.data_ptr(),
            weights=self.packed.data_ptr(), y=y.data_ptr(), groups=self.groups, rows=rows, tiles=self.tiles,
            x_bytes=4 * x.stride(0), keep=keep, eps=eps,
        )  # fmt: skip
        first, second = _compiled(self.form, before)
        return Task(call, (first, rows), (second, -(-self.outputs // SHARE)), kept)


def fits(outputs: int, columns: int) -> bool:
    return outputs % formats.NARROW == 0 and columns % GROUP == 0


def _lanes_for(outputs: int) -> int:
    return formats.widest() if outputs % formats.widest() == 0 else formats.NARROW


def four(codes: Tensor, scale: Tensor, floor: Tensor) -> Grouped:
    """codes [outputs, columns] uint8; scale and floor [outputs, groups], which float16 holds without loss in GGUF."""
    lanes, groups = _lanes_for(len(codes)), codes.shape[1] // GROUP
    tiles = len(codes) // lanes
    nibbles = codes.to(torch.int16).view(tiles, lanes, groups, 4, 4, 2)  # columns as quarters, pairs, and two
    words = (nibbles << torch.arange(0, 16, 4, dtype=torch.int16).unsqueeze(1)).sum(4, dtype=torch.int16)
    packed = words.permute(0, 2, 3, 1, 4).reshape(tiles, groups, -1).view(torch.uint8)
    return Grouped(formats.four(lanes), torch.cat((packed, *(_tiled(each.half(), lanes) for each in (scale, floor))), dim=2))


def eight(weight: Tensor) -> Grouped:
    """weight [outputs, columns] float32, rounded to 255 steps in each group: Q8_0 comes back as it was."""
    lanes, groups = _lanes_for(len(weight)), weight.shape[1] // GROUP
    grouped = weight.view(len(weight), groups, GROUP)
    scale = grouped.abs().amax(2).div_(127)  # [outputs, groups]
    codes = grouped.div(scale.clamp(min=1e-30).unsqueeze(2)).round_().to(torch.int8)
    paired = codes.view(-1, lanes, groups, GROUP // 2, 2).permute(0, 2, 3, 1, 4).reshape(len(weight) // lanes, groups, -1)
    return Grouped(formats.eight(lanes), torch.cat((paired.view(torch.uint8), _tiled(scale, lanes)), dim=2))


def _tiled(values: Tensor, lanes: int) -> Tensor:
    """[outputs, groups] -> bytes [tiles, groups, of a tile's outputs]."""
    tiled = values.view(-1, lanes, values.shape[1]).transpose(1, 2).contiguous()
    return tiled.view(torch.uint8)
