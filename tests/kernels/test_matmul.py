"""The matrix product of deterministic mode: right, and the same row for row whatever stands beside it."""

import pytest
import torch

from kernels.matmul import matmul, reference
from tests.kernels.paged import error, random


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 64, 40), (67, 97, 130), (5, 576, 33)])
def test_product(rows: int, depth: int, columns: int, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = random(rows, depth + 8, dtype=dtype, device=device)[:, :depth]
    weight = random(columns, depth, dtype=dtype, device=device)
    wanted, there = reference(x, weight), random(rows, columns + 8, dtype=torch.float32, device=device)[:, :columns]
    assert error(matmul(x, weight, torch.float32), wanted) < 1e-5
    wanted += there
    assert matmul(x, weight, torch.float32, there) is there
    assert error(there, wanted) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="in the interpreter a product is numpy's, which promises no order")
@pytest.mark.parametrize("columns", [70, 8200])
def test_a_row_is_the_same_in_any_company(columns: int, device: torch.device) -> None:
    """Numbers of rows of every tile, and rows in any place of it."""
    dtype, depth = torch.bfloat16, 1000
    x, weight = random(2100, depth, dtype=dtype, device=device), random(columns, depth, dtype=dtype, device=device)
    whole, there = matmul(x, weight, dtype), random(2100, columns, dtype=dtype, device=device)
    added = matmul(x, weight, dtype, there.clone())
    for first, last in ((0, 1), (63, 66), (1000, 1064), (1, 66), (700, 956), (0, 257), (9, 1033), (3, 1040)):
        assert torch.equal(matmul(x[first:last], weight, dtype), whole[first:last])
        assert torch.equal(matmul(x[first:last], weight, dtype, there[first:last].clone()), added[first:last])
