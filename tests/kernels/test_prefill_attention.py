"""Prefill attention against float64: every page size and head shape, cached prefixes, and what a token may not depend on."""

import pytest
import torch
from torch import Tensor

from kernels.prefill_attention import plan, prefill_attention, reference, scratch
from tests.kernels.paged import error, filled, random


def run(query: Tensor, pages: Tensor, tables: Tensor, new: list[int], ends: list[int], room: int = 0) -> Tensor:
    kv_heads, head_dim = pages.shape[2] // 2, pages.shape[3]
    spare = scratch(max(room, *ends), kv_heads, head_dim, pages.dtype, pages.device).fill_(float("nan"))
    work = plan(new, ends, len(spare))
    out = torch.full(query.shape, float("nan"), dtype=query.dtype, device=query.device)

    def sent(values: list[int] | list[tuple[int, int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=query.device)

    return prefill_attention(
        query, pages, tables, firsts(new).to(query.device), sent(ends), sent(work.tiles), sent(work.starts), work.groups,
        out, spare, head_dim**-0.5,
    )  # fmt: skip


def firsts(new: list[int]) -> Tensor:
    return torch.tensor([0, *new]).cumsum(0, dtype=torch.int32)


def check(
    new: list[int], ends: list[int], heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
    device: torch.device, room: int = 0,
) -> None:  # fmt: skip
    pages, tables = filled(ends, block_size, kv_heads, head_dim, dtype, device)
    query = random(sum(new), heads, head_dim, dtype=dtype, device=device)
    exact = reference(query.double(), pages.double(), tables, firsts(new), torch.tensor(ends), head_dim**-0.5)
    assert error(run(query, pages, tables, new, ends, room), exact) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("block_size", [8, 32])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (5, 1)])
def test_shapes(block_size: int, head_dim: int, heads: int, kv_heads: int, device: torch.device) -> None:
    """A whole prompt, one token, no new token, an empty row, a prefix that ends within a page, a tile's edges."""
    check([130, 1, 0, 0, 77, 128], [130, 97, 5, 0, 90, 256], heads, kv_heads, head_dim, block_size, torch.float16, device)
