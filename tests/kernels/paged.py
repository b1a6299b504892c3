"""Random pages for the attention kernels: what no row owns is NaN, and tables end in nonsense."""

from collections.abc import Sequence

import torch
from torch import Tensor


def filled(
    lengths: Sequence[int], block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pages and tables of rows of these lengths, blocks in random order; unused slots are NaN, unused table entries -1."""
    counts = [-(-length // block_size) for length in lengths]
    pages = torch.full((sum(counts) + 1, block_size, 2 * kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
    tables = torch.full((len(lengths), max(1, *counts)), -1, dtype=torch.int32, device=device)
    order = torch.randperm(sum(counts)).split(counts)
    for row, (length, blocks) in enumerate(zip(lengths, order, strict=True)):
        tables[row, : len(blocks)] = blocks.to(device)
        at = torch.arange(length)
        pages[blocks[at // block_size].to(device), (at % block_size).to(device)] = random(
            length, 2 * kv_heads, head_dim, dtype=dtype, device=device
        )
    return pages, tables


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    """‖got - wanted‖ / ‖wanted‖; NaN if anything is."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
