"""The gate and up products of an MLP and their activation in one, for many tokens on Hopper: silu(x · gateᵀ) * (x · upᵀ).

    x      [tokens, hidden]    any row stride of whole 16 bytes
    factor float32 [tokens]    both products are times it, before the activation (rms_norm.py)
    weight [2 * wide, hidden]  rows of gate and up in turns of 8, as silu_mul.py has its columns
    out    [tokens, wide]      both products in float32 until the activation is stored

What a library's product writes and an activation reads again, 2 * wide numbers a token, stays in registers. Three kinds of
warps share one processor, as in hopper_prefill.py: one loads tiles through the copy engine, two or three groups of four
multiply them, 64 rows each, and drift apart, so that one's activation hides behind another's products. In turns of 8, a
thread's accumulators hold gate and up of the same numbers, and of neighbours: nothing moves between threads before the store.
"""

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

from kernels import silu_mul
from kernels.hopper_tma import load, store
from kernels.silu_mul import TURN

LOG2E = gl.constexpr(1.4426950408889634)
STRIP = gl.constexpr(16)  # tiles of rows that go side by side through the weight's columns: what they share stays in the cache
ROWS = 64  # of a group: the least that a product of Hopper's takes
COLUMNS = 256
DEPTH = 64  # columns in at once: 128 bytes, the widest swizzle of the copy engine
STAGES = {2: 4, 3: 3}  # by groups: as many as the shared memory holds
PACE = {2: 1.0, 3: 0.97}  # time a row by groups, measured: three read a tile of the weight for more rows


def reference(x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    return silu_mul.reference(x.double() @ weight.double().t(), factor)


@gluon.jit
def _place(tile, down, across):
    """A tile's row and column: strips of rows, each walked from column to column."""
    first = tile // (STRIP * across) * STRIP
    within = tile % (STRIP * across)
    height = gl.minimum(down - first, STRIP)
    return first + within % height, within // height


@gluon.jit
def _load(x, weight, tiles, free, shape, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    x_tiles, weight_tiles, ready = tiles
    _, down, across, steps = shape
    ROWS: gl.constexpr = x.block_shape[0]
    DEPTH: gl.constexpr = x.block_shape[1]
    turn = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        row, column = _place(tile, down, across)
        for step in range(steps):
            slot = turn % STAGES
            mbarrier.wait(free.index(slot), (turn // STAGES & 1) ^ 1)
            arrived = ready.index(slot)
            mbarrier.expect(arrived, GROUPS * x.block_type.nbytes + weight.block_type.nbytes)
            for group in gl.static_range(GROUPS):
                at = [(row * GROUPS + group) * ROWS, step * DEPTH]
                load(x, at, arrived, x_tiles.index(slot * GROUPS + group))
            at = [column * weight.block_shape[0], step * DEPTH]
            load(weight, at, arrived, weight_tiles.index(slot))
            turn += 1


@gluon.jit
def _activate(both, layout: gl.constexpr):
    """[rows, columns] in turns of gate and up -> [rows, columns / 2]."""
    ROWS: gl.constexpr = both.shape[0]
    COLUMNS: gl.constexpr = both.shape[1]
    gate, up = gl.split(both.reshape([ROWS, COLUMNS // (2 * TURN), 2, TURN]).permute((0, 1, 3, 2)))
    out = gate / (1.0 + gl.exp2(-LOG2E * gate)) * up
    return gl.convert_layout(out.reshape([ROWS, COLUMNS // 2]), layout, assert_trivial=True)


@gluon.jit
def _start(acc, tiles, turn, group: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr):
    """One product of a group's rows and a tile of the weight, when they have arrived; it goes on meanwhile."""
    x_tiles, weight_tiles, ready = tiles
    slot = turn % STAGES
    mbarrier.wait(ready.index(slot), turn // STAGES & 1)
    rows = x_tiles.index(slot * GROUPS + group)
    return warpgroup_mma(rows, weight_tiles.index(slot).permute((1, 0)), acc, use_acc=ADD, is_async=True)


@gluon.jit
def _multiply(factor, out, out_tile, tiles, free, shape, group: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """One group's rows of every tile of this program.

    A product's tiles are free when the next product has been started and it has ended: the tensor cores never wait for us.
    """
    tokens, down, across, steps = shape
    ROWS: gl.constexpr = out_tile.shape[0]
    COLUMNS: gl.constexpr = 2 * out_tile.shape[1]
    WIDE: gl.constexpr = (
        COLUMNS if GROUPS == 2 else COLUMNS // 2
    )  # one product's registers, where threads get 128 to begin with
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE // 2, 16])
    none = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    within = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    turn = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        row, column = _place(tile, down, across)
        token = (row * GROUPS + group) * ROWS + within
        scale = gl.load(factor + token, mask=token < tokens, other=0.0)
        product = _start(none, tiles, turn, group, GROUPS, STAGES, False)
        acc = warpgroup_mma_wait(1, deps=[product])
        for _ in range(1, steps):
            turn += 1
            product = _start(acc, tiles, turn, group, GROUPS, STAGES, True)
            acc = warpgroup_mma_wait(1, deps=[product])
            mbarrier.arrive(free.index((turn - 1) % STAGES), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(turn % STAGES), count=1)
        turn += 1
        found = _activate(acc * scale.expand_dims(1), half).to(out.dtype)
        tma.store_wait(0)
        out_tile.store(found)
        fence_async_shared()
        store(out, [(row * GROUPS + group) * ROWS, column * (COLUMNS // 2)], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "down", "across", "steps"])
def _swiglu(x, factor, weight, out, tokens, down, across, steps, GROUPS: gl.constexpr, STAGES: gl.constexpr):
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
    tiles = (x_tiles, weight_tiles, ready)
    shape = (tokens, down, across, steps)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (factor, out, out_tiles.index(0), tiles, free, shape, 0, GROUPS, STAGES)),
                (_multiply, (factor, out, out_tiles.index(1), tiles, free, shape, 1, GROUPS, STAGES)),
                (_load, (x, weight, tiles, free, shape, GROUPS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (factor, out, out_tiles.index(0), tiles, free, shape, 0, GROUPS, STAGES)),
                (_multiply, (factor, out, out_tiles.index(1), tiles, free, shape, 1, GROUPS, STAGES)),
                (_multiply, (factor, out, out_tiles.index(2), tiles, free, shape, 2, GROUPS, STAGES)),
                (_load, (x, weight, tiles, free, shape, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def serves(weight: Tensor) -> bool:
    """The copy engine moves rows of whole 16 bytes."""
    halves = weight.dtype in (torch.bfloat16, torch.float16)
    whole = weight.shape[0] % (2 * TURN.value) == 0 and weight.shape[1] % 8 == 0
    return halves and whole and weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] == 9


def groups_for(tokens: int, columns: int, processors: int) -> int:
    """Two or three: those whose last tiles end first. Processors take tiles of equal size, so some idle at the end."""

    def ends(groups: int) -> float:
        tiles = -(-tokens // (groups * ROWS)) * -(-columns // COLUMNS)
        return -(-tiles // processors) * groups * PACE[groups]

    return min(STAGES, key=ends)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    element = gl.float16 if tensor.dtype == torch.float16 else gl.bfloat16
    return TensorDescriptor.from_tensor(tensor, [rows, columns], gl.NVMMASharedLayout.get_default_for([rows, columns], element))


def swiglu(x: Tensor, factor: Tensor, weight: Tensor, groups: int | None = None) -> Tensor:
    """[tokens, wide]; at least one token. `groups`: 2 or 3, else what suits the number of tokens."""
    processors = _processors(x.device)
    groups = groups or groups_for(len(x), len(weight), processors)
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    down, across, steps = -(-len(x) // (groups * ROWS)), -(-len(weight) // COLUMNS), -(-x.shape[1] // DEPTH)
    _swiglu[(min(down * across, processors),)](
        _described(x, ROWS, DEPTH), factor, _described(weight, COLUMNS, DEPTH), _described(out, ROWS, COLUMNS // 2),
        len(x), down, across, steps, groups, STAGES[groups], num_warps=4,
    )  # fmt: skip
    return out
