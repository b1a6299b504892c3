"""The gate and up products of an MLP and their activation in one, for many tokens on Hopper: silu(x · gateᵀ) * (x · upᵀ).

    x      [tokens, hidden]    any row stride of whole 16 bytes
    weight [2 * wide, hidden]  rows of gate and up in turns of 8, as `interleaved` puts them
    out    [tokens, wide]      both products in float32 until the activation is stored

What a library's product writes and an activation reads again, 2 * wide numbers a token, stays in registers. Three kinds of
programs share one multiprocessor, as in hopper_prefill.py: one warp loads tiles through the copy engine, groups of four warps
multiply them, each its own rows, and drift apart, so that one's activation hides behind another's products. In turns of 8, a
thread's accumulators hold gate and up of one number, and of its neighbour too: what it stores is as wide as without.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
TURN = gl.constexpr(8)  # rows of gate, then as many of up: the columns that lie side by side in a thread group's accumulators
DEPTH = 64  # columns in at once: 128 bytes, the widest swizzle of the copy engine
LOADER = 24  # registers of the loading warp's threads, the least there is


@dataclass(frozen=True)
class Tile:
    """What a program computes at once: groups * rows tokens by columns / 2 numbers; `strip` tiles of tokens go side by side."""

    groups: int
    rows: int
    columns: int
    stages: int
    strip: int


TILE = Tile(groups=2, rows=64, columns=256, stages=4, strip=16)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    both = (x.double() @ weight.double().t()).unflatten(1, (-1, 2, TURN.value))
    gate, up = (part.flatten(1) for part in both.unbind(2))
    return gate * gate.sigmoid() * up


@gluon.jit
def _place(tile, down, across, STRIP: gl.constexpr):
    """Row and column of a tile: strips of tokens, each walked from column to column, so that its tokens stay in the cache."""
    first = tile // (STRIP * across) * STRIP
    within = tile % (STRIP * across)
    height = gl.minimum(down - first, STRIP)
    return first + within % height, within // height


@gluon.jit
def _load(x, weight, tiles, ready, free, shape, GROUPS: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr):
    x_tiles, weight_tiles = tiles
    down, across, turns = shape
    ROWS: gl.constexpr = x.block_shape[0]
    DEPTH: gl.constexpr = x.block_shape[1]
    turn = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        row, column = _place(tile, down, across, STRIP)
        for step in range(turns):
            slot = turn % STAGES
            mbarrier.wait(free.index(slot), (turn // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(slot), GROUPS * x.block_type.nbytes + weight.block_type.nbytes)
            for group in gl.static_range(GROUPS):
                tma.async_copy_global_to_shared(
                    x, [(row * GROUPS + group) * ROWS, step * DEPTH], ready.index(slot), x_tiles.index(slot * GROUPS + group)
                )
            tma.async_copy_global_to_shared(
                weight, [column * weight.block_shape[0], step * DEPTH], ready.index(slot), weight_tiles.index(slot)
            )
            turn += 1


@gluon.jit
def _activate(both, layout: gl.constexpr):
    """[rows, columns] in turns of gate and up -> [rows, columns / 2]; nothing moves between threads."""
    ROWS: gl.constexpr = both.shape[0]
    COLUMNS: gl.constexpr = both.shape[1]
    turns = both.reshape([ROWS, COLUMNS // (2 * TURN), 2, TURN]).permute((0, 1, 3, 2))
    gate, up = gl.split(turns)
    out = gate / (1.0 + gl.exp2(-LOG2E * gate)) * up
    return gl.convert_layout(out.reshape([ROWS, COLUMNS // 2]), layout, assert_trivial=True)


@gluon.jit
def _multiply(out, tiles, out_tiles, ready, free, shape, group: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
              STRIP: gl.constexpr):  # fmt: skip
    """One group's rows of every tile of this program."""
    x_tiles, weight_tiles = tiles
    down, across, turns = shape
    ROWS: gl.constexpr = x_tiles.shape[1]
    COLUMNS: gl.constexpr = weight_tiles.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS // 2, 16])
    out_tile = out_tiles.index(group)
    none = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    turn = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        row, column = _place(tile, down, across, STRIP)
        slot = turn % STAGES
        mbarrier.wait(ready.index(slot), turn // STAGES & 1)
        first = warpgroup_mma(
            x_tiles.index(slot * GROUPS + group), weight_tiles.index(slot).permute((1, 0)), none, use_acc=False, is_async=True
        )
        acc = warpgroup_mma_wait(1, deps=[first])
        for _ in range(1, turns):
            last = slot
            turn += 1
            slot = turn % STAGES
            mbarrier.wait(ready.index(slot), turn // STAGES & 1)
            product = warpgroup_mma(
                x_tiles.index(slot * GROUPS + group), weight_tiles.index(slot).permute((1, 0)), acc, is_async=True
            )
            acc = warpgroup_mma_wait(1, deps=[product])
            mbarrier.arrive(free.index(last), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(slot), count=1)
        turn += 1
        found = _activate(acc, half).to(out.dtype)
        tma.store_wait(0)
        out_tile.store(found)
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [(row * GROUPS + group) * ROWS, column * (COLUMNS // 2)], out_tile)
    tma.store_wait(0)


@gluon.jit
def _swiglu(x, weight, out, down, across, turns, GROUPS: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
            REGISTERS: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = x.block_shape[0]
    DEPTH: gl.constexpr = x.block_shape[1]
    COLUMNS: gl.constexpr = weight.block_shape[0]
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES * GROUPS, ROWS, DEPTH], x.layout)
    weight_tiles = gl.allocate_shared_memory(weight.dtype, [STAGES, COLUMNS, DEPTH], weight.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, ROWS, COLUMNS // 2], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=GROUPS)
    fence_async_shared()
    tiles = (x_tiles, weight_tiles)
    shape = (down, across, turns)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (out, tiles, out_tiles, ready, free, shape, 0, GROUPS, STAGES, STRIP)),
                (_multiply, (out, tiles, out_tiles, ready, free, shape, 1, GROUPS, STAGES, STRIP)),
                (_load, (x, weight, tiles, ready, free, shape, GROUPS, STAGES, STRIP)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out, tiles, out_tiles, ready, free, shape, 0, GROUPS, STAGES, STRIP)),
                (_multiply, (out, tiles, out_tiles, ready, free, shape, 1, GROUPS, STAGES, STRIP)),
                (_multiply, (out, tiles, out_tiles, ready, free, shape, 2, GROUPS, STAGES, STRIP)),
                (_load, (x, weight, tiles, ready, free, shape, GROUPS, STAGES, STRIP)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
