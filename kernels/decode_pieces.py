"""How decode attention cuts the contexts of its rows into pieces, and what it made of these is put together again.

lengths int32 [rows]                       tokens to attend to
table   int32 [1 + rows * most, 4]         how many pieces; of each row * most + number, first token, last, pieces of its row
partial float32 [pieces, lines, head_dim]  what a piece's lines (tokens of its row by query heads) found
weights float32 [pieces, lines]            log2 of the sum of exponentials
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16  # tokens at once: pieces are whole tiles
FEW = 1024  # rows up to which one schedule serves
PIECES = 16  # pieces a row that scratch memory has room for


@dataclass(frozen=True)
class Splits:
    """A row is cut every `tokens` tokens, or into `most` pieces (a power of two) if it is too long for that."""

    tokens: int
    most: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens % TILE or self.most < 1 or self.most & (self.most - 1):
            raise ValueError(f"splits of {self.tokens} tokens, at most {self.most}: no multiple of {TILE} and power of two")


@dataclass(frozen=True)
class Pieces:
    """int32 [1 + rows * most, 4]: how many; of each row * most + number, first token, last, pieces of its row."""

    table: Tensor
    splits: Splits
    lengths: Tensor


def splits_for(rows: int) -> Splits:
    """Short pieces while there are few rows, so that every processor has some; long ones when the rows alone fill them."""
    if rows <= PIECES:
        return Splits(64, 4 * PIECES)
    return Splits(512, PIECES) if rows <= 3 * PIECES else Splits(1024, PIECES // 2)


@triton.jit
def _tokens(length, split_tokens, MOST: tl.constexpr, TILE: tl.constexpr):
    """Tokens of each piece of a row."""
    return tl.maximum(split_tokens, tl.cdiv(tl.cdiv(length, MOST), TILE) * TILE)


@triton.jit(do_not_specialize=["lengths", "rows"])
def _schedule(lengths, table, rows, split_tokens, ROWS: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr):
    """One row's pieces into the table, behind those of the rows before it."""
    row = tl.program_id(0)
    every = tl.arange(0, ROWS)
    length = tl.load(lengths + every, mask=every < rows, other=0)
    piece = _tokens(length, split_tokens, MOST, TILE)
    count = tl.where(every < rows, tl.maximum(tl.cdiv(length, piece), 1), 0)  # an empty row has one, which writes its zeros
    before = tl.sum(tl.where(every < row, count, 0), 0)
    mine = tl.sum(tl.where(every == row, count, 0), 0)
    tokens = tl.sum(tl.where(every == row, length, 0), 0)
    size = tl.sum(tl.where(every == row, piece, 0), 0)
    at = tl.arange(0, MOST)
    record = table + 4 * (1 + before + at)
    tl.store(record, row * MOST + at, mask=at < mine)
    tl.store(record + 1, at * size, mask=at < mine)
    tl.store(record + 2, tl.minimum(at * size + size, tokens), mask=at < mine)
    tl.store(record + 3, mine, mask=at < mine)
    if row == 0:
        tl.store(table, tl.sum(count, 0))


@triton.jit
def combine(partial, weights, out, out_head, count, ALL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
             DIM: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Add up `count` parts of one (row, key head). Read past the first-level cache: other processors wrote them."""
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    at = tl.arange(0, MOST)
    mine = (at < count)[:, None] & (g < GROUP)[None, :]
    none = tl.where(g < GROUP, float("-inf"), 0.0)[None, :]  # heads that only fill up the power of two stay finite
    every = tl.load(weights + at[:, None] * ALL + g[None, :], mask=mine, other=none, cache_modifier=".cg")
    peak = tl.max(every, 0)
    total = tl.sum(tl.exp2(every - peak[None, :]), 0)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    whole = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    for start in range(0, count, CHUNK):
        part = start + tl.arange(0, CHUNK)
        some = (part < count)[:, None] & (g < GROUP)[None, :]
        share = tl.load(weights + part[:, None] * ALL + g[None, :], mask=some, other=none, cache_modifier=".cg")
        where = part[:, None, None] * (ALL * HEAD_DIM) + (g[:, None] * HEAD_DIM + d[None, :])[None, :, :]
        piece = tl.load(partial + where, mask=some[:, :, None] & whole[None, :, :], other=0.0, cache_modifier=".cg")
        acc += tl.sum(piece * (tl.exp2(share - peak[None, :]) / total[None, :])[:, :, None], 0)
    tl.store(out + g[:, None] * out_head + d[None, :], acc.to(out.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=["firsts", "lengths"])
def _sum_up(partial, weights, out, firsts, lengths, split_tokens, out_row, out_head, ALL: tl.constexpr, PACK: tl.constexpr,
            HEAD_DIM: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One query head of one token of a row: its parts, all at once."""
    row, line = tl.program_id(0), tl.program_id(1)
    begin = tl.load(firsts + row)
    length = tl.load(lengths + row)
    count = tl.cdiv(length, _tokens(length, split_tokens, MOST, TILE))
    if (count > 1) & (line // ALL < tl.load(firsts + row + 1) - begin):
        at = tl.arange(0, MOST)
        d = tl.arange(0, DIM)
        part = (row.to(tl.int64) * MOST + at) * (ALL * PACK) + line
        weight = tl.load(weights + part, mask=at < count, other=float("-inf"))
        share = tl.exp2(weight - tl.max(weight, 0))
        mine = (at < count)[:, None] & (d < HEAD_DIM)[None, :]
        piece = tl.load(partial + part[:, None] * HEAD_DIM + d[None, :], mask=mine, other=0.0)
        total = tl.sum(piece * (share / tl.sum(share, 0))[:, None], 0)
        where = out + (begin + line // ALL) * out_row + line % ALL * out_head
        tl.store(where + d, total.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def schedule(lengths: Tensor, splits: Splits) -> Pieces:
    """Once a step, for all layers."""
    rows = len(lengths)
    table = torch.empty(1 + rows * splits.most, 4, dtype=torch.int32, device=lengths.device)
    wide = 32 if rows <= 32 else max(FEW, triton.next_power_of_2(rows))  # not one for each: every one is compiled
    _schedule[(rows,)](lengths, table, rows, splits.tokens, wide, splits.most, TILE, num_warps=1)
    return Pieces(table, splits, lengths)


def sum_up(partial: Tensor, weights: Tensor, pieces: Pieces, firsts: Tensor, out: Tensor, pack: int) -> None:
    """Rows of up to `pack` tokens that are cut into more than one piece: into `out` [tokens, heads, head_dim]."""
    rows, (_, heads, size), splits = len(pieces.lengths), out.shape, pieces.splits
    _sum_up[(rows, heads * pack)](
        partial, weights, out, firsts, pieces.lengths, splits.tokens, out.stride(0), out.stride(1), heads, pack, size,
        triton.next_power_of_2(size), splits.most, TILE, num_warps=4,
    )  # fmt: skip
