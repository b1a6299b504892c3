"""A few vectors times a matrix, against float64."""

import pytest
import torch

from kernels.gemv import gemv, reference
from tests.kernels.paged import error, random


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("depth", "columns"), [(64, 40), (97, 130), (1100, 33)])
def test_product(rows: int, depth: int, columns: int, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = random(rows, depth + 8, dtype=dtype, device=device)[:, :depth]
    weight = random(columns, depth, dtype=dtype, device=device)
    wanted, there = reference(x, weight), random(rows, columns + 8, dtype=torch.float32, device=device)[:, :columns]
    assert error(gemv(x, weight, torch.float32), wanted) < 1e-5
    wanted += there
    assert gemv(x, weight, torch.float32, onto=there) is there
    assert error(there, wanted) < 1e-5


def test_too_many_rows(device: torch.device) -> None:
    with pytest.raises(ValueError, match="5 rows"):
        gemv(torch.zeros(5, 8, device=device), torch.zeros(4, 8, device=device), torch.float32)
