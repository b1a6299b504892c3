"""Norm, rotary embedding, activation, embedding: against float64, on shapes that hurt, outputs poisoned."""

import pytest
import torch
from torch import Tensor

from kernels import embed, rms_norm, rope, silu_mul
from tests.kernels.paged import error, random


@pytest.fixture
def dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def least(dtype: torch.dtype) -> float:
    return 6e-3 if dtype == torch.bfloat16 else 1e-6


def strided(tensor: Tensor) -> Tensor:
    """The same values in rows that lie further apart, NaN between them."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 24), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, 8 : 8 + tensor.shape[1]] = tensor
    return wide[:, 8 : 8 + tensor.shape[1]]


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (3, 576), (5, 4096), (2, 97)])
def test_rms_norm(tokens: int, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
    residual = strided(random(tokens, hidden, dtype=dtype, device=device) * 9)
    weight = random(hidden, dtype=dtype, device=device)
    assert error(rms_norm.rms_norm(residual, weight, 1e-5), rms_norm.reference(residual, weight, 1e-5)) < least(dtype)
    assert error(rms_norm.factor(residual, 1e-5), rms_norm.reference_factor(residual, 1e-5)) < 1e-6


@pytest.mark.parametrize(("tokens", "wide", "hidden"), [(1, 96, 64), (3, 2056, 576), (70, 136, 97)])
def test_silu_mul(tokens: int, wide: int, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
    residual = strided(random(tokens, hidden, dtype=dtype, device=device) * 9)
    both = strided(random(tokens, 2 * wide, dtype=dtype, device=device) * 9)
    wanted = silu_mul.reference(both, rms_norm.reference_factor(residual, 1e-5))
    assert error(silu_mul.silu_mul(both, residual, 1e-5), wanted) < least(dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 128), (6, 1, 96), (2, 2, 16)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rope(heads: int, kv_heads: int, size: int, family: str, device: torch.device, dtype: torch.dtype) -> None:
    tokens, block_size = 7, 8
    qkv = strided(random(tokens, (heads + 2 * kv_heads) * size, dtype=dtype, device=device))
    residual = strided(random(tokens, 97, dtype=dtype, device=device) * 9)
    angles = torch.rand(50, size // 2, device=device) * 6
    turns = torch.stack((angles.cos(), angles.sin()), -1)
    positions = torch.randint(0, 50, (tokens,), device=device, dtype=torch.int32)
    slots = torch.randperm(5 * block_size, device=device)[:tokens]
    pages = torch.full((5, block_size, 2 * kv_heads, size), torch.nan, dtype=dtype, device=device)
    bias = random(qkv.shape[1], dtype=dtype, device=device) if family == "qwen2" else None
    norms = random(heads + kv_heads, size, dtype=dtype, device=device) if family == "qwen3" else None
    factor = rms_norm.reference_factor(residual, 1e-6)
    wanted = rope.reference(qkv, factor, positions, turns, kv_heads, bias, norms, 1e-6)
    before = qkv[:, heads * size :].clone()
    rope.rope(qkv, residual, positions, turns, slots, pages, bias, norms, 1e-6)
    assert error(qkv[:, : heads * size].reshape(tokens, heads, size), wanted[:, :heads]) < least(dtype)
    assert torch.equal(qkv[:, heads * size :], before)
    flat = pages.flatten(0, 1)
    assert error(flat[slots], wanted[:, heads:]) < least(dtype)
    assert int(flat.isnan().all(-1).all(-1).sum()) == 5 * block_size - tokens, "a slot of nobody's was written"


def test_embed_and_tables(device: torch.device, dtype: torch.dtype) -> None:
    block_size, hidden = 8, 1100
    embedding = random(40, hidden, dtype=dtype, device=device)
    int32 = {"dtype": torch.int32, "device": device}
    tables = torch.randint(1, 90, (6, 200), **int32)
    newest = torch.tensor([3, 5, 7, 11, 13, 17], **int32)
    slot_of, ends = torch.tensor([4, 0, 5], **int32), torch.tensor([9, 1600, 0], **int32)
    ids, rows = torch.tensor([-1, 2, 39, -1], **int32), torch.tensor([0, 1, 1, 2], **int32)
    positions = torch.tensor([8, 1598, 1599, 0], **int32)
    x, slots = embed.embed(ids, rows, positions, slot_of, newest, tables, embedding, block_size)
    wanted, where = embed.reference(ids, rows, positions, slot_of, newest, tables, embedding, block_size)
    assert torch.equal(x, wanted)
    assert torch.equal(slots, where)
    out = embed.gather_tables(slot_of, ends, tables, torch.full((3, 200), -7, **int32), block_size)
    assert out[0, :2].tolist() == tables[4, :2].tolist() and set(out[0, 2:].tolist()) == {-7}
    assert torch.equal(out[1], tables[0])
    assert set(out[2].tolist()) == {-7}
