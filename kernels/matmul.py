"""A matrix product whose rows do not depend on each other's number: the same x row gives the same bits in any batch.

    x      [rows, columns in]      any row stride
    weight [columns out, columns in]
    out    [rows, columns out]     x · weightᵀ, summed in float32 in one order, whatever the number of rows; or that added to
                                   what is there

A library chooses tiles, and how often it cuts the sum, by the number of rows; here both are fixed by the weight's shape.
He et al., "Defeating Nondeterminism in LLM Inference" (2025).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, DEPTH = 64, 64  # a tile's rows, and the columns summed at once


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().t()


@triton.jit
def _matmul(x, weight, out, rows, columns, depth, x_row, weight_row, out_row,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
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


def matmul(x: Tensor, weight: Tensor, dtype: torch.dtype, onto: Tensor | None = None) -> Tensor:
    """[rows, columns out] of `dtype`; or added to `onto`, in place. The last dimension of x and weight must be contiguous."""
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("rows of x and weight must be contiguous")
    out = torch.empty(len(x), len(weight), dtype=dtype, device=x.device) if onto is None else onto
    columns = 32 if len(weight) <= 8192 else 128  # narrow weights have enough tiles for all processors only if these are small
    _matmul[(triton.cdiv(len(weight), columns), triton.cdiv(len(x), ROWS))](
        x, weight, out, len(x), len(weight), x.shape[1], x.stride(0), weight.stride(0), out.stride(0),
        ROWS, columns, DEPTH, onto is not None, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
