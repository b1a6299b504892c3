"""A matrix product whose rows do not depend on each other's number: the same x row gives the same bits in any batch.

    x      [rows, columns in]      any row stride
    weight [columns out, columns in]
    out    [rows, columns out]     x · weightᵀ, summed in float32 in one order, whatever the number of rows; or that added to
                                   what is there

A library cuts the sum, and so changes its order, by the number of rows. Here every sum goes from the first column in to the
last, 16 at once, which is what one instruction of the matrix units takes: so tiles may have any size, and do go by the number
of rows. He et al., "Defeating Nondeterminism in LLM Inference" (2025).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIP = tl.constexpr(16)  # tiles of rows that go side by side through the weight's columns: what they share stays in the cache


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


NARROW = 4224  # columns out, up to which larger tiles would leave some of 132 processors without one
FASTEST = (  # measured on an H100: rows, and the tiles for up to so many, of narrow weights and of others
    (64, Tile(64, 32, 128, 4, 6), Tile(64, 64, 128, 4, 4)),
    (128, Tile(64, 64, 128, 4, 4), Tile(128, 64, 64, 4, 4)),
    (256, Tile(128, 64, 128, 4, 3), Tile(128, 128, 64, 8, 4)),
    (512, Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3)),
    (1 << 30, Tile(256, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3)),
)


def tile_for(rows: int, columns: int) -> Tile:
    """Few rows wait for the weight, so many programs read it; many rows share what one program has read."""
    narrow, other = next(tiles for most, *tiles in FASTEST if rows <= most)
    return narrow if columns <= NARROW else other


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().t()


@triton.jit
def _matmul(x, weight, out, rows, columns, depth, x_row, weight_row, out_row,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // (STRIP * across) * STRIP
    within = tl.program_id(0) % (STRIP * across)
    height = tl.minimum(down - first, STRIP)
    row = (first + within % height) * ROWS + tl.arange(0, ROWS)
    column = within // height * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    p_x = x + row.to(tl.int64)[:, None] * x_row + d[None, :]
    p_weight = weight + column.to(tl.int64)[None, :] * weight_row + d[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        inside = d < depth - start
        b_x = tl.load(p_x + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        b_weight = tl.load(p_weight + start, mask=(column < columns)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(b_x, b_weight, acc)
    place = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if ADD:
        acc += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


def matmul(x: Tensor, weight: Tensor, dtype: torch.dtype, onto: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """[rows, columns out] of `dtype`; or added to `onto`, in place. The last dimension of x and weight must be contiguous."""
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("rows of x and weight must be contiguous")
    rows, columns = len(x), len(weight)
    tile = tile or tile_for(rows, columns)
    out = torch.empty(rows, columns, dtype=dtype, device=x.device) if onto is None else onto
    _matmul[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x, weight, out, rows, columns, x.shape[1], x.stride(0), weight.stride(0), out.stride(0),
        tile.rows, tile.columns, tile.depth, onto is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
