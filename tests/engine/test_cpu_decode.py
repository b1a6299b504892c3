"""The CPU's attention kernel against its plain-torch reference: any shape, any lengths, any order of blocks, any threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu import decode, jit
from kernels.cpu.pages import Shape

pytestmark = pytest.mark.skipif(not jit.available(), reason="no AVX2 here")
SHAPES = [Shape(9, 3, 64, 16), Shape(4, 4, 32, 8), Shape(6, 1, 16, 32), Shape(10, 2, 48, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), max_size=7),
    others=st.integers(0, 3),
    seed=st.integers(0, 99),
    threads=st.integers(1, 2),
)
def test_decode(shape: Shape, lengths: list[int], others: int, seed: int, threads: int) -> None:
    """`others` are tokens of prefill rows: put away, not attended for. What lies behind a row's end is NaN here."""
    if not lengths and not others:
        return
    before, random = torch.get_num_threads(), torch.Generator().manual_seed(seed)
    rows, size, tokens = len(lengths), shape.block_size, len(lengths) + others
    longest = max(lengths, default=0)
    width = -(-longest // size)
    blocks = rows * width + others
    page = torch.randn(blocks, size, 2 * shape.kv_heads, shape.head_dim, generator=random).bfloat16()
    order = torch.randperm(blocks, generator=random)
    tables, spare = order[: rows * width].view(rows, width), order[rows * width :]
    places = torch.tensor([length - 1 for length in lengths] + [0] * others, dtype=torch.int64)
    ends = [int(tables[row, place // size]) * size + place % size for row, place in enumerate(places[:rows].tolist())]
    for end in ends:
        page.view(blocks, size, -1)[end // size, end % size + 1 :] = torch.nan
    slots = torch.tensor(ends + (spare * size).tolist(), dtype=torch.int64)
    qkv = torch.randn(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim, generator=random)
    angles = 9 * torch.randn(tokens, shape.head_dim // 2, generator=random)
    turn = torch.stack((angles.cos(), angles.sin()), dim=-1)
    other_qkv, other_page = qkv.clone(), page.clone()
    torch.set_num_threads(threads)
    out = decode.Step(shape, turn, slots, tables.flatten(), places, rows, longest)(qkv, page)
    torch.set_num_threads(before)
    if rows:
        expected = decode.reference(other_qkv, turn, other_page, slots, tables, places)
        torch.testing.assert_close(out.view_as(expected), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(qkv, other_qkv, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(page.float(), other_page.float(), rtol=1e-2, atol=1e-2, equal_nan=True)
