"""Prefill attention for Hopper: the statement of prefill_attention.py over gathered keys and values, placed by hand.

Three kinds of warps share a tile of 128 queries: one loads keys and values through the copy engine, two groups of four attend
to 64 queries each. A group weighs this tile's scores while it multiplies the last tile's weights with their values, and the two
groups drift apart, so that one's exponentials hide behind the other's products. After Shah et al., "FlashAttention-3" (2024).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.hopper_tma import load

LOG2E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-1.0e30)  # the first peak, finite: a query that sees nothing of its first tile must not make a NaN
QUERIES = 128
KEYS = 128
STAGES = 2
GATHERED = 128  # gathered rows begin at multiples of this: a tile of keys never shows a neighbour's


@dataclass(frozen=True)
class Gathered:
    """Keys and values of rows one behind the other, as the copy engine reads them."""

    both: Tensor  # [tokens, 2 * kv_heads * head_dim]
    keys: TensorDescriptor
    values: TensorDescriptor


@triton.jit(do_not_specialize_on_alignment=["tables", "starts", "ends"])
def _gather(pages, tables, starts, ends, both, page_stride, token_stride, table_row, WIDTH: tl.constexpr,
            BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """A row's pages, one behind the other: [tokens, 2 * kv_heads * head_dim], zeros from its end to the next row."""
    row = tl.program_id(1)
    end = tl.load(ends + row)
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, triton.next_power_of_2(WIDTH))
    inside = (at < tl.cdiv(end, ROUND) * ROUND)[:, None] & (column < WIDTH)[None, :]
    block = tl.load(tables + row * table_row + at // BLOCK_SIZE, mask=at < end, other=0).to(tl.int64)
    source = block * page_stride + at % BLOCK_SIZE * token_stride
    found = tl.load(pages + source[:, None] + column[None, :], mask=inside & (at < end)[:, None], other=0.0)
    target = (tl.load(starts + row) + at).to(tl.int64) * WIDTH
    tl.store(both + target[:, None] + column[None, :], found, mask=inside)


@gluon.jit
def _load(keys, values, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, start, column, count, KEYS: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """Tiles count - 1 .. 0 of one row's keys and values."""
    for turn in range(count):
        slot = turn % STAGES
        phase = (turn // STAGES & 1) ^ 1
        at = start + (count - 1 - turn) * KEYS
        mbarrier.wait(k_free.index(slot), phase)
        mbarrier.expect(k_ready.index(slot), keys.block_type.nbytes)
        load(keys, [at, column], k_ready.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_ready.index(slot), values.block_type.nbytes)
        load(values, [at, column], v_ready.index(slot), v_tiles.index(slot))


@gluon.jit
def _weigh(score, peak, total, scale, position, at, HIDE: gl.constexpr, KEYS: gl.constexpr, layout: gl.constexpr):
    """Scores -> weights against the new peak, the new peak and sum, and by how much the old ones fade."""
    if HIDE:
        column = at + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
        score = gl.where(column[None, :] <= position[:, None], score, float("-inf"))
    higher = gl.maximum(peak, gl.max(score, 1) * scale)
    weight = gl.exp2(score * scale - higher[:, None])
    fade = gl.exp2(peak - higher)
    return weight, higher, total * fade + gl.sum(weight, 1), fade


@gluon.jit
def _turns(q, weight, fade, acc, peak, total, scale, position, low, high, count, k_tiles, v_tiles, k_ready, v_ready, k_free,
           v_free, HIDE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Turns low..high: this tile's scores and the last one's weights times its values, then this one's weights.

    The barrier before the last wait is the next turn's: the compiler cannot move the wait past it, in front of the weights.
    """
    operand: gl.constexpr = weight.type.layout
    QUERIES: gl.constexpr = q.shape[0]
    none = gl.zeros([QUERIES, KEYS], gl.float32, layout)
    for turn in range(low, high):
        slot = turn % STAGES
        last = (turn - 1) % STAGES
        mbarrier.wait(k_ready.index(slot), turn // STAGES & 1)
        score = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout))[:, None]
        mbarrier.wait(v_ready.index(last), (turn - 1) // STAGES & 1)
        acc = warpgroup_mma(weight, v_tiles.index(last), acc, is_async=True)
        score = warpgroup_mma_wait(1, deps=[score])
        mbarrier.arrive(k_free.index(slot), count=1)
        fresh, peak, total, fade = _weigh(score, peak, total, scale, position, (count - 1 - turn) * KEYS, HIDE, KEYS, layout)
        following = turn + 1
        mbarrier.wait(k_ready.index(following % STAGES), following // STAGES & 1, pred=following < count)
        acc, weight = warpgroup_mma_wait(0, deps=[acc, weight])
        mbarrier.arrive(v_free.index(last), count=1)
        weight = gl.convert_layout(fresh.to(weight.dtype), operand)
    return weight, fade, acc, peak, total


@gluon.jit
def _attend(common, part: gl.constexpr, DIM: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """One group: queries first + 64 * part .. + 64 of a row; the last `masked` tiles of keys are not seen by all of them."""
    q_tiles, k_tiles, v_tiles, q_ready, k_ready, v_ready, k_free, v_free = common[0]
    out, scale, begin, first, new, offset, count, masked, out_row = common[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    at = first + part * QUERIES + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, layout))
    position = offset + at
    q = q_tiles.index(part)
    peak = gl.full([QUERIES], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([QUERIES], gl.float32, gl.SliceLayout(1, layout))
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    none = gl.zeros([QUERIES, KEYS], gl.float32, layout)
    score = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(k_free.index(0), count=1)
    weight, peak, total, fade = _weigh(score, peak, total, scale, position, (count - 1) * KEYS, True, KEYS, layout)
    weight = gl.convert_layout(weight.to(out.dtype.element_ty), operand)
    acc = gl.zeros([QUERIES, DIM], gl.float32, wide)
    weight, fade, acc, peak, total = _turns(
        q, weight, fade, acc, peak, total, scale, position, 1, masked, count,
        k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, True, KEYS, STAGES, layout,
    )  # fmt: skip
    weight, fade, acc, peak, total = _turns(
        q, weight, fade, acc, peak, total, scale, position, masked, count, count,
        k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, False, KEYS, STAGES, layout,
    )  # fmt: skip
    slot = (count - 1) % STAGES
    mbarrier.wait(v_ready.index(slot), (count - 1) // STAGES & 1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, wide))[:, None]
    acc = warpgroup_mma(weight, v_tiles.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, wide))[:, None]
    row = first + part * QUERIES + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    where = (begin + row).to(gl.int64)[:, None] * out_row + d[None, :]
    gl.store(out + where, acc.to(out.dtype.element_ty), mask=(row < new)[:, None])


@gluon.jit(do_not_specialize_on_alignment=["tiles"])
def _prefill(query, keys, values, starts, firsts, ends, tiles, out, scale, out_row, out_head,
             HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    tile = gl.program_id(0) // HEADS
    head = gl.program_id(0) % HEADS
    row = gl.load(tiles + tile * 2)
    first = gl.load(tiles + tile * 2 + 1)
    begin = gl.load(firsts + row)
    new = gl.load(firsts + row + 1) - begin
    end = gl.load(ends + row)
    offset = end - new
    start = gl.load(starts + row)
    seen = gl.minimum(end, offset + first + QUERIES)
    count = gl.cdiv(seen, KEYS)
    masked = gl.maximum(count - (offset + first + 1) // KEYS, 1)
    half: gl.constexpr = QUERIES // 2
    q_tiles = gl.allocate_shared_memory(query.dtype, [2, half, DIM], query.layout)
    k_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, KEYS, DIM], keys.layout)
    v_tiles = gl.allocate_shared_memory(values.dtype, [STAGES, KEYS, DIM], values.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)
        mbarrier.init(v_free.index(slot), count=2)
    fence_async_shared()
    mbarrier.expect(q_ready, 2 * query.block_type.nbytes)
    for part in gl.static_range(2):
        load(query, [begin + first + part * half, head * DIM], q_ready, q_tiles.index(part))
    place = out + head * out_head
    shared = (q_tiles, k_tiles, v_tiles, q_ready, k_ready, v_ready, k_free, v_free)
    common = (shared, (place, scale * LOG2E, begin, first, new, offset, count, masked, out_row))
    gl.warp_specialize(
        [
            (_attend, (common, 0, DIM, half, KEYS, STAGES)),
            (_attend, (common, 1, DIM, half, KEYS, STAGES)),
            (_load, (keys, values, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, start, head // (HEADS // KV_HEADS) * DIM,
                     count, KEYS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def serves(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    halves = dtype in (torch.bfloat16, torch.float16)
    return halves and head_dim in (64, 128) and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def gathered(tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Gathered:
    both = torch.empty(tokens, 2 * kv_heads * head_dim, dtype=dtype, device=device)
    keys, values = both.split(kv_heads * head_dim, 1)
    return Gathered(both, _described(keys, KEYS, head_dim), _described(values, KEYS, head_dim))


@cache
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], gl.float16 if dtype == torch.float16 else gl.bfloat16)


def _described(tensor: Tensor, rows: int, head_dim: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, head_dim], _layout(rows, head_dim, tensor.dtype))


def gather(pages: Tensor, tables: Tensor, starts: Tensor, ends: Tensor, gathered: Gathered, longest: int) -> None:
    """Copy the rows' pages to where their `starts` say, zeros after their ends."""
    tokens = 4
    _gather[(-(-longest // GATHERED) * GATHERED // tokens, len(ends))](
        pages, tables, starts, ends, gathered.both, pages.stride(0), pages.stride(1), tables.stride(0),
        pages.shape[2] * pages.shape[3], pages.shape[1], tokens, GATHERED, num_warps=4,
    )  # fmt: skip


def attend(
    query: Tensor, gathered: Gathered, starts: Tensor, firsts: Tensor, ends: Tensor, tiles: Tensor, out: Tensor, scale: float
) -> None:
    heads, head_dim = query.shape[1:]
    flat = query.as_strided((len(query), heads * head_dim), (query.stride(0), 1))
    _prefill[(len(tiles) * heads,)](
        _described(flat, QUERIES // 2, head_dim), gathered.keys, gathered.values, starts, firsts, ends, tiles, out, scale,
        out.stride(0), out.stride(1), heads, gathered.both.shape[1] // (2 * head_dim), head_dim, QUERIES, KEYS, STAGES,
        num_warps=4,
    )  # fmt: skip
