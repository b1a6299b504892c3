"""Decode attention over paged keys and values: one or few new tokens a row, split along the context (flash-decoding).

    query   [tokens, heads, head_dim]                          any strides but the last; a token a row, but see below
    pages   [blocks, block_size, 2 * kv_heads, head_dim]       one layer: key heads first, then value heads
    tables  int32 [rows, blocks of the longest row]            a row's blocks in order; what lies past its end is never read
    lengths int32 [rows]                                       tokens to attend to, the new ones included; 0: an empty row
    firsts  int32 [rows + 1], or none                          where a row's tokens begin; without, row r is token r
    out     [tokens, heads, head_dim]                          softmax(scale * q[t, h] · K[h // group]) · V[h // group]

`schedule` cuts the rows of a step into pieces, once for all layers. Every launch depends on static things only (rows, splits,
processors), so a CUDA graph may replay it at any lengths: a persistent grid, whose programs take every so many-th of (piece,
key head). Heads that share a key head are the M of one product, so keys and values are read once. A row of one piece is written
directly; otherwise the program that arrives last adds up the parts, in the order of the pieces. How a row is cut depends on its
own length alone, so with the same `Splits` a row's result is the same, bit for bit, whatever stands in the other rows.

That product has 16 lines at least, of which a group of 4 heads fills 4. So with `firsts` a row may have up to `packed(group)`
tokens, each of which sees the keys up to its own: they share the reading, too. A row of more gets nonsense for the first ones.
Their parts are many: then a second kernel adds them up, with a program for each token's head.

After Dao et al., "Flash-Decoding for long-context inference" (2023); the last arrival adds up, as in "Stream-K" (2023).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_pieces import PIECES, TILE, Pieces, combine, sum_up

LOG2E = tl.constexpr(math.log2(math.e))
# Programs of one warp, which need no barriers, eight a processor: the best of those measured on an H100, at every batch.
STAGES, RESIDENTS = 3, 8
COMBINED = 2048  # elements of parts in registers at once when they are added up
LINES = 16  # of a product, at least
PACKED = 4  # tokens of a row, at most


@dataclass(frozen=True)
class Scratch:
    """What the pieces of a row leave for the last of them. One serves all layers, and every batch that fits."""

    partial: Tensor  # float32 [pieces, heads, head_dim]
    weights: Tensor  # float32 [pieces, heads]: log2 of the sum of exponentials
    arrivals: Tensor  # int32 [rows, kv_heads]: zero between launches


def packed(group: int) -> int:
    """Tokens of a row that fill a product, at most."""
    return max(1, min(LINES // group, PACKED))


def scratch(rows: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Scratch:
    """For up to so many rows."""
    pieces = max(rows, 4 * PIECES * PACKED) * PIECES
    return Scratch(
        torch.empty(pieces, heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(pieces, heads, dtype=torch.float32, device=device),
        torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
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
def _record(table, number, pieces):
    place = table + 4 * (1 + tl.minimum(number, pieces - 1))
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def _attend(
    q, seen, pages, table, first, last, scale, page_stride, token_stride, head_stride, PACK: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens first..last of one key head (`pages` points at it) -> the mean of the values, log2 of the sum of exponentials.

    Of a row of several tokens, a line of `q` sees only the first `seen`: perhaps none of these.
    """
    HEADS: tl.constexpr = q.shape[0]
    DIM: tl.constexpr = q.shape[1]
    # A tile begins at a multiple of itself: where it lies within a page, one address is looked up for all of it.
    LOOKED: tl.constexpr = 1 if TILE <= BLOCK_SIZE else TILE
    d = tl.arange(0, DIM)
    inside = (d < HEAD_DIM)[None, :]
    token = tl.arange(0, TILE)
    below = token * token_stride if TILE <= BLOCK_SIZE else token * 0
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    values = pages + KV_HEADS * head_stride
    at = first + tl.arange(0, LOOKED)
    ahead = tl.load(table + at // BLOCK_SIZE, mask=at < last, other=0)  # a tile early: the pages' addresses must not wait
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        at = start + tl.arange(0, LOOKED)
        slot = ahead.to(tl.int64) * page_stride + (at % BLOCK_SIZE) * token_stride
        ahead = tl.load(table + (at + TILE) // BLOCK_SIZE, mask=at + TILE < last, other=0)
        where = slot[:, None] + below[:, None] + d[None, :]
        live = start + token < last
        key = tl.load(pages + where, mask=live[:, None] & inside, other=0.0)
        value = tl.load(values + where, mask=live[:, None] & inside, other=0.0)
        shown = live[None, :] if PACK == 1 else live[None, :] & (start + token[None, :] < seen[:, None])
        score = tl.where(shown, tl.dot(q, tl.trans(key)) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = higher if PACK == 1 else tl.where(higher > float("-inf"), higher, 0.0)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None])
        peak = higher
    total = tl.where((last > first) if PACK == 1 else (total > 0), total, 1.0)
    return acc / total[:, None], peak + tl.log2(total)


@triton.jit
def _lines(head, begin, tokens, HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, ALL: tl.constexpr):
    """Of a row's product with one key head: each line's token, query head, place in its row's scratch; and which there are."""
    g = tl.arange(0, HEADS)
    nth = g * 0 if PACK == 1 else g // GROUP
    heads = head * GROUP + (g if PACK == 1 else g % GROUP)
    return begin + nth, heads, nth * ALL + heads, (g < GROUP * PACK) & (nth < tokens)


@triton.jit(do_not_specialize=["tables", "table_row", "pieces", "firsts", "lengths"])
def _decode(
    query, pages, tables, out, table, partial, weights, arrivals, firsts, lengths, scale, pieces,
    query_row, query_head, page_stride, token_stride, head_stride, table_row, out_row, out_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = KV_HEADS * GROUP
    ROOM: tl.constexpr = ALL * PACK
    d = tl.arange(0, DIM)
    programs = tl.num_programs(0)
    place_next, first_next, last_next, count_next = _record(table, tl.program_id(0) // KV_HEADS, pieces)
    for item in range(tl.program_id(0), tl.load(table) * KV_HEADS, programs):
        place, first, last, count = place_next, first_next, last_next, count_next
        place_next, first_next, last_next, count_next = _record(table, (item + programs) // KV_HEADS, pieces)
        row = place // MOST
        head = item % KV_HEADS
        begin = row
        tokens = 1
        end = last
        if firsts is not None:
            begin = tl.load(firsts + row)
            tokens = tl.load(firsts + row + 1) - begin
            end = tl.load(lengths + row)
        token, heads, slots, real = _lines(head, begin, tokens, HEADS, GROUP, PACK, ALL)
        whole = real[:, None] & (d < HEAD_DIM)[None, :]
        at = token * query_row + heads * query_head
        q = tl.load(query + at[:, None] + d[None, :], mask=whole, other=0.0)
        acc, weight = _attend(
            q, end - tokens + 1 + token - begin, pages + head * head_stride, tables + row * table_row, first, last,
            scale * LOG2E, page_stride, token_stride, head_stride, PACK, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, STAGES,
        )  # fmt: skip
        if count == 1:
            where = token * out_row + heads * out_head
            tl.store(out + where[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=whole)
        else:
            mine = place.to(tl.int64) * ROOM + slots
            tl.store(partial + mine[:, None] * HEAD_DIM + d[None, :], acc, mask=whole)
            tl.store(weights + mine, weight, mask=real)
            if firsts is None:  # else `sum_up` follows: so many lines would keep one program long
                tl.debug_barrier()  # every thread's part before the one thread's arrival
                arrival = arrivals + row * KV_HEADS + head
                if tl.atomic_add(arrival, 1, sem="release") == count - 1:
                    tl.atomic_xchg(arrival, 0, sem="acquire")
                    part = row.to(tl.int64) * (MOST * ALL) + head * GROUP
                    target = out + row * out_row + head * GROUP * out_head
                    combine(
                        partial + part * HEAD_DIM, weights + part, target, out_head, count, ALL, GROUP, HEAD_DIM, DIM, MOST,
                        CHUNK,
                    )  # fmt: skip


def decode_attention(
    query: Tensor, pages: Tensor, tables: Tensor, pieces: Pieces, out: Tensor, scratch: Scratch, scale: float, processors: int,
    firsts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`processors`: multiprocessors to fill. The head dimension must be contiguous in query, pages and out."""
    rows, (_, heads, head_dim) = len(tables), query.shape
    block_size, kv_heads, most = pages.shape[1], pages.shape[2] // 2, pieces.splits.most
    group = heads // kv_heads
    count, pack = len(pieces.table) - 1, 1 if firsts is None else packed(group)
    if heads % kv_heads or scratch.partial.shape[1:] != (heads, head_dim) or scratch.arrivals.shape[1] != kv_heads:
        raise ValueError(f"scratch {tuple(scratch.partial.shape)} does not fit {heads}/{kv_heads} heads of {head_dim}")
    if count != rows * most or count * pack > len(scratch.partial) or rows > len(scratch.arrivals):
        raise ValueError(f"{count} pieces of {rows} rows do not fit scratch for {len(scratch.partial)}")
    if (rows if firsts is None else rows + 1) != len(query if firsts is None else firsts):
        raise ValueError(
            f"{rows} rows, and {len(query)} tokens" if firsts is None else f"{rows} rows begin {len(firsts)} times"
        )
    if any(tensor.stride(-1) != 1 for tensor in (query, pages, tables, out)):
        raise ValueError("the last dimension of query, pages, tables and out must be contiguous")
    dim, wide = triton.next_power_of_2(head_dim), triton.next_power_of_2(group * pack)
    _decode[(min(processors * RESIDENTS, count * kv_heads),)](
        query, pages, tables, out, pieces.table, scratch.partial, scratch.weights, scratch.arrivals, firsts, pieces.lengths,
        scale, count, query.stride(0), query.stride(1), pages.stride(0), pages.stride(1), pages.stride(2), tables.stride(0),
        out.stride(0), out.stride(1), kv_heads, group, max(LINES, wide), pack, head_dim, dim, block_size, most, TILE,
        STAGES, max(1, COMBINED // (wide * dim)), num_warps=1,
    )  # fmt: skip
    if firsts is not None:
        sum_up(scratch.partial, scratch.weights, pieces, firsts, out, pack)
    return out
