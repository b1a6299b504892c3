"""Decode attention over paged keys and values: one new token a row, split along the context (flash-decoding).

    query   [rows, heads, head_dim]                            any strides but the last
    pages   [blocks, block_size, 2 * kv_heads, head_dim]       one layer: key heads first, then value heads
    tables  int32 [rows, blocks of the longest row]            a row's blocks in order; what lies past its end is never read
    lengths int32 [rows]                                       tokens to attend to, the new one included; 0: an empty row
    out     [rows, heads, head_dim]                            softmax(scale * q[r, h] · K[h // group]) · V[h // group]

Everything the launch depends on is static (rows, table width, processors), so a CUDA graph may replay it at any lengths. A
persistent grid: each program counts the rows' splits itself and takes every so many-th of (row, split, key head). Heads that
share a key head are the M of one product, so keys and values are read once. A row of one split is written directly; otherwise
the program that arrives last adds up the parts, in the order of the splits. How a row is cut depends on its own length alone,
so with the same `Splits` a row's result is the same, bit for bit, whatever stands in the other rows.

After Dao et al., "Flash-Decoding for long-context inference" (2023); the last arrival adds up, as in "Stream-K" (2023).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
COMBINED = 4096  # elements of parts in registers at once when they are added up


@dataclass(frozen=True)
class Splits:
    """A row is cut every `tokens` tokens, or into `most` pieces (a power of two) if it is too long for that."""

    tokens: int
    most: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.most < 1 or self.most & (self.most - 1):
            raise ValueError(f"splits of {self.tokens} tokens, at most {self.most}: not a size and a power of two")


@dataclass(frozen=True)
class Launch:
    """What is tuned: tokens a tile, warps a program, tiles in flight, programs a processor.

    Programs of one warp, which need no barriers, eight a processor, were the best on an H100 at every batch.
    """

    tile: int = 16
    warps: int = 1
    stages: int = 3
    residents: int = 8


@dataclass(frozen=True)
class Scratch:
    """What the splits of a row leave for the last of them. One serves all layers, and every batch of up to its rows."""

    partial: Tensor  # float32 [rows, kv_heads, most, group, head_dim]
    weights: Tensor  # float32 [rows, kv_heads, most, group]: log2 of the sum of exponentials
    arrivals: Tensor  # int32 [rows, kv_heads]: zero between launches
    splits: Splits


FEW = 16  # rows that cannot fill the processors


def scratch(rows: int, heads: int, kv_heads: int, head_dim: int, splits: Splits, device: torch.device) -> Scratch:
    parts = (rows, kv_heads, splits.most, heads // kv_heads)
    return Scratch(
        torch.empty(*parts, head_dim, dtype=torch.float32, device=device),
        torch.empty(parts, dtype=torch.float32, device=device),
        torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
        splits,
    )


def reference(query: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """The same in plain torch, in the inputs' precision."""
    kv_heads = pages.shape[2] // 2
    group = query.shape[1] // kv_heads
    out = torch.zeros_like(query)
    for row, length in enumerate(lengths.tolist()):
        if not length:
            continue
        blocks = tables[row, : -(-length // pages.shape[1])].long()
        both = pages[blocks].flatten(0, 1)[:length].transpose(0, 1)  # [2 * kv_heads, length, head_dim]
        keys, values = (half.repeat_interleave(group, 0) for half in both.split(kv_heads))
        scores = torch.einsum("hd,htd->ht", query[row], keys) * scale
        out[row] = torch.einsum("ht,htd->hd", scores.softmax(-1), values)
    return out


@triton.jit
def _piece(length, split_tokens, MOST: tl.constexpr, TILE: tl.constexpr):
    """Tokens a split of a row: a multiple of the tile."""
    return tl.maximum(split_tokens, tl.cdiv(tl.cdiv(length, MOST), TILE) * TILE)


@triton.jit
def _attend(
    q, pages, table, first, last, scale, page_stride, token_stride, head_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens first..last of one key head (`pages` points at it) -> the mean of the values, log2 of the sum of exponentials."""
    HEADS: tl.constexpr = q.shape[0]
    DIM: tl.constexpr = q.shape[1]
    d = tl.arange(0, DIM)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    at = first + tl.arange(0, TILE)
    ahead = tl.load(table + at // BLOCK_SIZE, mask=at < last, other=0)  # a tile early: the pages' addresses must not wait
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        block = ahead
        at = start + tl.arange(0, TILE)
        live = at < last
        ahead = tl.load(table + (at + TILE) // BLOCK_SIZE, mask=at + TILE < last, other=0)
        slot = block.to(tl.int64) * page_stride + (at % BLOCK_SIZE) * token_stride
        key = tl.load(pages + slot[None, :] + d[:, None], mask=live[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        values = pages + KV_HEADS * head_stride
        value = tl.load(values + slot[:, None] + d[None, :], mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        score = tl.where(live[None, :], tl.dot(q, key) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None])
        peak = higher
    total = tl.where(last > first, total, 1.0)
    return acc / total[:, None], peak + tl.log2(total)


@triton.jit
def _combine(partial, weights, out, out_head, count, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
             MOST: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Add up `count` parts of one (row, key head). Read past the first-level cache: other processors wrote them."""
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    at = tl.arange(0, MOST)
    mine = (at < count)[:, None] & (g < GROUP)[None, :]
    none = tl.where(g < GROUP, float("-inf"), 0.0)[None, :]  # heads that only fill up the power of two stay finite
    every = tl.load(weights + at[:, None] * GROUP + g[None, :], mask=mine, other=none, cache_modifier=".cg")
    peak = tl.max(every, 0)
    total = tl.sum(tl.exp2(every - peak[None, :]), 0)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    whole = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    for start in range(0, count, CHUNK):
        part = start + tl.arange(0, CHUNK)
        some = (part < count)[:, None] & (g < GROUP)[None, :]
        share = tl.load(weights + part[:, None] * GROUP + g[None, :], mask=some, other=none, cache_modifier=".cg")
        where = part[:, None, None] * (GROUP * HEAD_DIM) + (g[:, None] * HEAD_DIM + d[None, :])[None, :, :]
        piece = tl.load(partial + where, mask=some[:, :, None] & whole[None, :, :], other=0.0, cache_modifier=".cg")
        acc += tl.sum(piece * (tl.exp2(share - peak[None, :]) / total[None, :])[:, :, None], 0)
    tl.store(out + g[:, None] * out_head + d[None, :], acc.to(out.dtype.element_ty), mask=whole)


@triton.jit
def _decode(
    query, pages, tables, lengths, out, partial, weights, arrivals, scale, rows, split_tokens,
    query_row, query_head, page_stride, token_stride, head_stride, table_row, out_row, out_head,
    ROWS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    every = tl.arange(0, ROWS)
    length = tl.load(lengths + every, mask=every < rows, other=0)
    # An empty row has one split, which writes its zeros.
    splits = tl.where(every < rows, tl.maximum(tl.cdiv(length, _piece(length, split_tokens, MOST, TILE)), 1), 0)
    ends = tl.cumsum(splits, 0)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    whole = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    for item in range(tl.program_id(0), tl.sum(splits, 0) * KV_HEADS, tl.num_programs(0)):
        head = item % KV_HEADS
        work = item // KV_HEADS
        row = tl.sum((ends <= work).to(tl.int32), 0)
        split = work - tl.max(tl.where(ends <= work, ends, 0), 0)
        tokens = tl.load(lengths + row)
        piece = _piece(tokens, split_tokens, MOST, TILE)
        count = tl.cdiv(tokens, piece)
        heads = head * GROUP + g
        q = tl.load(query + row * query_row + heads[:, None] * query_head + d[None, :], mask=whole, other=0.0)
        acc, weight = _attend(
            q, pages + head * head_stride, tables + row * table_row, split * piece, tl.minimum(split * piece + piece, tokens),
            scale * LOG2E, page_stride, token_stride, head_stride, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, STAGES,
        )  # fmt: skip
        place = out + row * out_row + head * GROUP * out_head
        if count <= 1:
            tl.store(place + g[:, None] * out_head + d[None, :], acc.to(out.dtype.element_ty), mask=whole)
        else:
            part = ((row * KV_HEADS + head) * MOST).to(tl.int64) * GROUP
            mine = part + split * GROUP + g
            tl.store(partial + mine[:, None] * HEAD_DIM + d[None, :], acc, mask=whole)
            tl.store(weights + mine, weight, mask=g < GROUP)
            tl.debug_barrier()  # every thread's part before the one thread's arrival
            arrival = arrivals + row * KV_HEADS + head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == count - 1:
                tl.store(arrival, 0)
                _combine(partial + part * HEAD_DIM, weights + part, place, out_head, count, GROUP, HEAD_DIM, DIM, MOST, CHUNK)


def splits_for(rows: int) -> Splits:
    """Short pieces while there are few rows, so that every processor has some; long ones when the rows alone fill them."""
    return Splits(64, 32) if rows <= FEW else Splits(512, 32)


def decode_attention(
    query: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, out: Tensor, scratch: Scratch, scale: float,
    processors: int, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """`processors`: multiprocessors to fill. The head dimension must be contiguous in query, pages and out."""
    rows, heads, head_dim = query.shape
    block_size, kv_heads = pages.shape[1], pages.shape[2] // 2
    group = heads // kv_heads
    if heads % kv_heads or rows > scratch.arrivals.shape[0] or scratch.partial.shape[1:] != (
        kv_heads, scratch.splits.most, group, head_dim,
    ):  # fmt: skip
        raise ValueError(f"scratch {tuple(scratch.partial.shape)} does not fit {rows} rows of {heads}/{kv_heads} heads")
    if any(tensor.stride(-1) != 1 for tensor in (query, pages, tables, out)):
        raise ValueError("the last dimension of query, pages, tables and out must be contiguous")
    launch = launch or Launch()
    split = -(-scratch.splits.tokens // launch.tile) * launch.tile
    dim = triton.next_power_of_2(head_dim)
    chunk = max(1, COMBINED // (triton.next_power_of_2(group) * dim))
    programs = min(processors * launch.residents, rows * kv_heads * scratch.splits.most)
    _decode[(programs,)](
        query, pages, tables, lengths, out, scratch.partial, scratch.weights, scratch.arrivals, scale, rows, split,
        query.stride(0), query.stride(1), pages.stride(0), pages.stride(1), pages.stride(2), tables.stride(0),
        out.stride(0), out.stride(1),
        max(32, triton.next_power_of_2(rows)), kv_heads, group, max(16, triton.next_power_of_2(group)), head_dim, dim,
        block_size, scratch.splits.most, launch.tile, launch.stages, chunk,
        num_warps=launch.warps,
    )  # fmt: skip
    return out
