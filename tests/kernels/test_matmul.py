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
def test_a_row_is_the_same_in_any_company(device: torch.device) -> None:
    dtype = torch.bfloat16
    x, weight = random(130, 200, dtype=dtype, device=device), random(70, 200, dtype=dtype, device=device)
    whole = matmul(x, weight, dtype)
    for first, last in ((0, 1), (63, 66), (100, 130)):
        assert torch.equal(matmul(x[first:last], weight, dtype), whole[first:last])
