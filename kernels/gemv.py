"""A matrix times a few vectors: what a linear layer is when hardly anybody decodes. Bound by reading the weight once.

    x      [rows, columns in]      1 to MOST rows, any row stride
    weight [columns out, columns in]
    out    [rows, columns out]     x · weightᵀ, or that added to what is there: in float32 until it is stored

Each program takes some columns out and reads their weights from one end to the other, many bytes in flight, without the matrix
units: at so few rows these wait for memory in any case.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 4


def reference(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().t()


@triton.jit
def _gemv(x, weight, out, columns, depth, x_row, weight_row, out_row,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    p_weight = weight + column.to(tl.int64)[:, None] * weight_row + d[None, :]
    row = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS, DEPTH], tl.float32)
    for start in range(0, depth, DEPTH):
        inside = d < depth - start
        b_weight = tl.load(p_weight + start, mask=(column < columns)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        b_x = tl.load(x + row[:, None] * x_row + start + d[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        acc += b_weight[None, :, :] * b_x[:, None, :]
    place = out + row[:, None] * out_row + column[None, :]
    total = tl.sum(acc, 2)
    if ADD:
        total += tl.load(place, mask=(column < columns)[None, :], other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=(column < columns)[None, :])


def gemv(x: Tensor, weight: Tensor, dtype: torch.dtype, tile: tuple[int, int, int] | None = None,
         onto: Tensor | None = None) -> Tensor:  # fmt: skip
    """[rows, columns out] of `dtype`; or added to `onto`, in place. rows: 1, 2 or 4.

    `tile`: columns out, columns in, warps of a program.
    """
    rows, depth = x.shape
    if rows not in (1, 2, 4) or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"{rows} rows: 1, 2 or 4, and rows of x and weight contiguous, are what this is for")
    columns, deep, warps = tile or (8, 512 // rows, 4)
    out = torch.empty(rows, len(weight), dtype=dtype, device=x.device) if onto is None else onto
    _gemv[(triton.cdiv(len(weight), columns),)](
        x, weight, out, len(weight), depth, x.stride(0), weight.stride(0), out.stride(0), rows, columns, deep,
        onto is not None, num_warps=warps, num_stages=4,
    )  # fmt: skip
    return out
