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


@dataclass(frozen=True)
class Tile:
    """What a program computes at once: groups * rows tokens by columns / 2 numbers; `strip` tiles of tokens go side by side."""

    groups: int
    rows: int
    columns: int
    stages: int
    strip: int


TILE = Tile(groups=2, rows=64, columns=256, stages=4, strip=16)
REGISTERS = {2: 240, 3: 160}  # of a multiplying group's threads, by how many groups share what there is


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
    WIDE: gl.constexpr = COLUMNS if GROUPS == 2 else COLUMNS // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE // 2, 16])
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


@gluon.jit(do_not_specialize=["down", "across", "turns"])
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


def serves(hidden: int, wide: int, dtype: torch.dtype, device: torch.device) -> bool:
    """The copy engine moves rows of whole 16 bytes, and turns are of 8 rows."""
    halves = dtype in (torch.bfloat16, torch.float16)
    whole = hidden % 8 == 0 and wide % TURN.value == 0
    return halves and whole and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def interleaved(gate_up: Tensor) -> Tensor:
    """Rows of gate, then of up [2 * wide, hidden] -> the same rows in turns of 8."""
    return gate_up.unflatten(0, (2, -1, TURN.value)).transpose(0, 1).flatten(0, 2)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    element = gl.float16 if tensor.dtype == torch.float16 else gl.bfloat16
    return TensorDescriptor.from_tensor(tensor, [rows, columns], gl.NVMMASharedLayout.get_default_for([rows, columns], element))


def swiglu(x: Tensor, weight: Tensor, tile: Tile = TILE) -> Tensor:
    """[tokens, wide]; `weight` as `interleaved` gives it; tokens >= 1."""
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    down, across = -(-len(x) // (tile.groups * tile.rows)), -(-len(weight) // tile.columns)
    _swiglu[(min(down * across, _processors(x.device)),)](
        _described(x, tile.rows, DEPTH), _described(weight, tile.columns, DEPTH), _described(out, tile.rows, tile.columns // 2),
        down, across, -(-x.shape[1] // DEPTH), tile.groups, tile.stages, tile.strip, REGISTERS[tile.groups], num_warps=4,
    )  # fmt: skip
    return out
