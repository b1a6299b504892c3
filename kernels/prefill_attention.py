"""Prefill attention: ragged, causal, over a cached prefix and the new tokens, whose keys and values are in the pages already.

    query  [tokens, heads, head_dim]                           the rows' new tokens, packed; any row stride
    firsts int32 [rows + 1]                                    where each row's new tokens begin in `query`
    ends   int32 [rows]                                        tokens of a row in all: cached prefix + new
    pages  [blocks, block_size, 2 * kv_heads, head_dim]        one layer: key heads first, then value heads
    tables int32 [rows, blocks of the longest row]             what lies past a row's end is never read
    tiles  int32 [n, 2]                                        the work: (row, first new token), from `plan`
    starts int32 [rows]                                        where a row's keys and values begin when gathered, from `plan`
    out    [tokens, heads, head_dim]                           softmax(scale * q[t, h] · K[..p]) · V[..p], p: t's position

Keys and values are taken in tiles of a fixed size from position 0 on, so a token's result is the same, bit for bit, whatever
stands in the other rows. After Dao, "FlashAttention-2" (2023).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import hopper_prefill
from kernels.hopper_prefill import GATHERED

LOG2E = tl.constexpr(math.log2(math.e))
QUERIES = 128  # new tokens a tile
ALONE = 64  # the least that a tile of one token's heads has
KEYS, STAGES = 64, 2  # keys a tile, tiles in flight: within 99 KB of shared memory at head_dim 128


@dataclass(frozen=True)
class Group:
    """Rows whose keys and values are gathered together."""

    rows: slice
    tiles: slice
    longest: int  # tokens of the longest of them


@dataclass(frozen=True)
class Plan:
    """A step's work as the host lays it out; `tiles` and `starts` go to the device."""

    tiles: list[tuple[int, int]]
    starts: list[int]
    groups: list[Group]


@dataclass(frozen=True)
class Scratch:
    """Room for the keys and values that are gathered at once."""

    tokens: int
    gathered: hopper_prefill.Gathered | None  # None: pages are read where they are


def plan(new: Sequence[int], ends: Sequence[int], room: int) -> Plan:
    """Rows in order, as many a group as `room` tokens hold; a group's longest tiles first, so that none is left for its end."""
    laid = Plan([], [], [])
    first = used = 0
    for row, end in enumerate(ends):
        whole = -(-end // GATHERED) * GATHERED
        if whole > room:
            raise ValueError(f"a row of {end} tokens does not fit the room for {room}")
        if used + whole > room:
            _close(laid, new, ends, first, row)
            first, used = row, 0
        laid.starts.append(used)
        used += whole
    _close(laid, new, ends, first, len(ends))
    return laid


def _close(laid: Plan, new: Sequence[int], ends: Sequence[int], first: int, last: int) -> None:
    tiles = [(row, at) for row in range(first, last) for at in range(0, new[row], QUERIES)]
    if tiles:
        tiles.sort(key=lambda tile: new[tile[0]] - ends[tile[0]] - tile[1])
        done = len(laid.tiles)
        laid.tiles.extend(tiles)
        laid.groups.append(Group(slice(first, last), slice(done, done + len(tiles)), max(ends[first:last])))


def reference(query: Tensor, pages: Tensor, tables: Tensor, firsts: Tensor, ends: Tensor, scale: float) -> Tensor:
    """The same in plain torch, in the inputs' precision."""
    kv_heads = pages.shape[2] // 2
    group = query.shape[1] // kv_heads
    out = torch.zeros_like(query)
    for row, end in enumerate(ends.tolist()):
        first, last = firsts[row : row + 2].tolist()
        blocks = tables[row, : -(-end // pages.shape[1])].long()
        both = pages[blocks].flatten(0, 1)[:end].transpose(0, 1)  # [2 * kv_heads, end, head_dim]
        keys, values = (half.repeat_interleave(group, 0) for half in both.split(kv_heads))
        scores = torch.einsum("thd,hsd->hts", query[first:last], keys) * scale
        seen = torch.ones(last - first, end, dtype=torch.bool, device=query.device).tril(end - (last - first))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("hts,hsd->thd", weights, values)
    return out


@triton.jit
def _fold(q, key, value, start, position, peak, total, acc, scale, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """One tile of keys [DIM, KEYS] and values [KEYS, DIM] into the running softmax."""
    score = tl.dot(q, key) * scale
    if MASKED:
        score = tl.where(start + tl.arange(0, KEYS)[None, :] <= position[:, None], score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None])
    return higher, total, acc


@triton.jit
def _begin(query, firsts, ends, tiles, query_row, query_head, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
           DIM: tl.constexpr, QUERIES: tl.constexpr, SIDE: tl.constexpr):  # fmt: skip
    """A program's tile of QUERIES: SIDE heads of each token, side by side. Its row, heads, tokens in `query`, which of them
    exist, their positions, the queries.
    """
    programs: tl.constexpr = HEADS // SIDE
    row = tl.load(tiles + tl.program_id(0) // programs * 2)
    first = tl.load(tiles + tl.program_id(0) // programs * 2 + 1)
    head = tl.program_id(0) % programs * SIDE + tl.arange(0, QUERIES) % SIDE
    begin = tl.load(firsts + row)
    count = tl.load(firsts + row + 1) - begin
    end = tl.load(ends + row)
    at = first + tl.arange(0, QUERIES) // SIDE
    d = tl.arange(0, DIM)
    where = ((begin + at).to(tl.int64) * query_row + head * query_head)[:, None] + d[None, :]
    q = tl.load(query + where, mask=(at < count)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    return row, head, begin + at, at < count, end - count + first, end, q


@triton.jit
def _finish(out, acc, total, token, live, head, out_row, out_head, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    where = (token.to(tl.int64) * out_row + head * out_head)[:, None] + d[None, :]
    total = tl.where(live, total, 1.0)  # a tile of padding has seen nothing
    tl.store(out + where, (acc / total[:, None]).to(out.dtype.element_ty), mask=live[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _paged_tiles(
    q, pages, table, low, high, end, position, peak, total, acc, scale, page_stride, token_stride, head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, q.shape[1])
    inside = d < HEAD_DIM
    for start in tl.range(low, high, KEYS, num_stages=STAGES):
        at = start + tl.arange(0, KEYS)
        live = at < end
        block = tl.load(table + at // BLOCK_SIZE, mask=live, other=0)
        slot = block.to(tl.int64) * page_stride + (at % BLOCK_SIZE) * token_stride
        values = pages + KV_HEADS * head_stride
        if MASKED:
            key = tl.load(pages + slot[None, :] + d[:, None], mask=live[None, :] & inside[:, None], other=0.0)
            value = tl.load(values + slot[:, None] + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        else:
            key = tl.load(pages + slot[None, :] + d[:, None], mask=inside[:, None], other=0.0)
            value = tl.load(values + slot[:, None] + d[None, :], mask=inside[None, :], other=0.0)
        peak, total, acc = _fold(q, key, value, start, position, peak, total, acc, scale, KEYS, MASKED)
    return peak, total, acc


@triton.jit
def _prefill(
    query, pages, tables, firsts, ends, tiles, out, scale,
    query_row, query_head, page_stride, token_stride, head_stride, table_row, out_row, out_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, INVARIANT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    row, head, token, live, offset, end, q = _begin(
        query, firsts, ends, tiles, query_row, query_head, HEADS, HEAD_DIM, DIM, QUERIES, SIDE
    )
    position = offset + tl.arange(0, QUERIES) // SIDE
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM], tl.float32)
    table = tables + row * table_row
    place = pages + tl.program_id(0) % (HEADS // SIDE) * SIDE // (HEADS // KV_HEADS) * head_stride
    # Tiles that every query of this one sees to the end. Where a chunk began must not matter: then one loop for all of them.
    whole = 0 if INVARIANT else (offset + 1) // KEYS * KEYS
    peak, total, acc = _paged_tiles(
        q, place, table, 0, whole, end, position, peak, total, acc, scale * LOG2E, page_stride, token_stride, head_stride,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, STAGES, False,
    )  # fmt: skip
    peak, total, acc = _paged_tiles(
        q, place, table, whole, tl.minimum(end, offset + QUERIES), end, position, peak, total, acc, scale * LOG2E,
        page_stride, token_stride, head_stride, KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, STAGES, True,
    )  # fmt: skip
    _finish(out, acc, total, token, live, head, out_row, out_head, HEAD_DIM, DIM)


def scratch(room: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Scratch:
    """For at least the longest row's tokens. One serves all layers."""
    tokens = -(-max(room, 1) // GATHERED) * GATHERED
    by_hand = hopper_prefill.serves(head_dim, dtype, device)
    return Scratch(tokens, hopper_prefill.gathered(tokens, kv_heads, head_dim, dtype, device) if by_hand else None)


def prefill_attention(
    query: Tensor, pages: Tensor, tables: Tensor, firsts: Tensor, ends: Tensor, tiles: Tensor, starts: Tensor,
    groups: Sequence[Group], out: Tensor, scratch: Scratch, scale: float,
) -> Tensor:  # fmt: skip
    """`tiles`, `starts` and `groups` are of one `plan` for the scratch's room."""
    head_dim = query.shape[2]
    if any(tensor.stride()[-2:] != (head_dim, 1) for tensor in (query, pages)) or tables.stride(1) != 1 or out.stride(2) != 1:
        raise ValueError("heads of query and pages, and the last dimension of tables and out, must be contiguous")
    if scratch.gathered is not None:
        for group in groups:
            hopper_prefill.gather(
                pages, tables[group.rows], starts[group.rows], ends[group.rows], scratch.gathered, group.longest
            )
            hopper_prefill.attend(query, scratch.gathered, starts, firsts, ends, tiles[group.tiles], out, scale)
    else:
        prefill_in_place(query, pages, tables, firsts, ends, tiles, out, scale)
    return out


def prefill_in_place(
    query: Tensor, pages: Tensor, tables: Tensor, firsts: Tensor, ends: Tensor, tiles: Tensor, out: Tensor, scale: float,
    invariant: bool = False, alone: bool = False,
) -> Tensor:  # fmt: skip
    """Reads the pages where they lie: best for short rows. The launch depends on the number of tiles alone, so a CUDA graph
    may replay it; a tile of a row without new tokens writes nothing. `invariant`: a token's result is the same, bit for bit,
    also when its row comes in other chunks, down to one token at a time. `alone`: no row has more than one new token.
    """
    heads, head_dim = query.shape[1:]
    side = heads // (pages.shape[2] // 2) if alone else 1  # one token's heads that share keys fill a tile better than it does
    queries = max(triton.next_power_of_2(side), ALONE) if alone else QUERIES
    if len(tiles):
        _prefill[(len(tiles) * heads // side,)](
            query, pages, tables, firsts, ends, tiles, out, scale, query.stride(0), query.stride(1), pages.stride(0),
            pages.stride(1), pages.stride(2), tables.stride(0), out.stride(0), out.stride(1), heads, pages.shape[2] // 2,
            head_dim, triton.next_power_of_2(head_dim), pages.shape[1], queries, KEYS, STAGES, invariant, side,
            num_warps=queries // 16,
        )  # fmt: skip
    return out
