"""Prefill attention against float64: every page size and head shape, cached prefixes, and what a token may not depend on."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.prefill_attention import GATHERED, plan, prefill_attention, prefill_in_place, reference, scratch
from tests.kernels.paged import error, filled, random


def run(query: Tensor, pages: Tensor, tables: Tensor, new: list[int], ends: list[int], room: int = 0) -> Tensor:
    kv_heads, head_dim = pages.shape[2] // 2, pages.shape[3]
    spare = scratch(max(room, *ends), kv_heads, head_dim, pages.dtype, pages.device)
    work = plan(new, ends, spare.tokens)
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


@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 64), (16, 96), (32, 128)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
def test_shapes(block_size: int, head_dim: int, heads: int, kv_heads: int, device: torch.device) -> None:
    """A whole prompt, one token, no new token, an empty row, a prefix that ends within a page, a tile's edges."""
    check([130, 1, 0, 0, 67], [130, 97, 5, 0, 90], heads, kv_heads, head_dim, block_size, torch.float16, device)


@settings(max_examples=6, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=3), room=st.integers(0, 600))
def test_lengths(rows: list[tuple[int, int]], room: int, device: torch.device) -> None:
    """Any new tokens over any prefixes, gathered in any number of groups."""
    new = [count for count, _ in rows]
    ends = [count + before for count, before in rows]
    check(new, ends, 2, 1, 64, 16, torch.float32 if device.type == "cpu" else torch.bfloat16, device, room)


def test_a_token_depends_on_its_row_alone(device: torch.device) -> None:
    """Bit for bit: among other rows or alone, whole or in chunks, queries out of a fused projection or not."""
    new, ends = [140, 9, 33], [140, 64, 70]
    pages, tables = filled(ends, 16, 1, 64, torch.float16, device)
    fused = random(sum(new), 4, 64, dtype=torch.float16, device=device)
    together = run(fused[:, :2], pages, tables, new, ends)
    for row, (first, last) in enumerate(firsts(new).unfold(0, 2, 1).tolist()):
        mine = fused[first:last, :2].contiguous()
        assert torch.equal(run(mine, pages, tables[row : row + 1], [last - first], [ends[row]]), together[first:last])
    for first, last in ((0, 50), (50, 140)):
        chunk = run(fused[first:last, :2], pages, tables, [last - first], [last])
        assert error(chunk, together[first:last]) < (1e-3 if device.type == "cpu" else 1e-30)  # numpy's products vary by row


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (9, 3, 96), (3, 3, 128), (67, 1, 64)])
def test_tokens_alone_are_as_in_their_chunk(heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
    """The last tokens of a chunk, each in a row of its own, over the same pages; and a row of padding."""
    pages, tables = filled([150], 16, kv_heads, head_dim, torch.float16, device)
    query = random(150, heads, head_dim, dtype=torch.float16, device=device)
    ends, alone = [150, 149, 129, 64, 1], torch.tensor([149, 148, 128, 63, 0], device=device)

    def sent(values: list[int] | list[tuple[int, int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def in_place(query: Tensor, new: list[int], ends: list[int], tiles: list[tuple[int, int]], alone: bool) -> Tensor:
        out, rows = torch.full(query.shape, float("nan"), dtype=query.dtype, device=device), tables.expand(len(ends), -1)
        where = firsts(new).to(device), sent(ends), sent(tiles)
        return prefill_in_place(query, pages, rows, *where, out, head_dim**-0.5, True, alone)

    chunk = in_place(query, [150], [150], [(0, 0), (0, 128)], False)
    each = in_place(query[alone], [1, 1, 1, 1, 1, 0], [*ends, 0], [(row, 0) for row in range(6)], True)
    assert error(each, chunk[alone]) < (1e-3 if device.type == "cpu" else 1e-30)


def test_plan_keeps_to_its_room() -> None:
    """Every new token is in one tile, every row's keys lie within the room and apart from its group's."""
    new, ends = [300, 1, 0, 129, 128], [300, 1000, 40, 129, 1024]
    work = plan(new, ends, 1024)
    covered = sorted((row, at) for row, first in work.tiles for at in range(first, min(first + 128, new[row])))
    assert covered == [(row, at) for row, count in enumerate(new) for at in range(count)]
    for group in work.groups:
        rows = range(*group.rows.indices(len(new)))
        assert {row for row, _ in work.tiles[group.tiles]} == {row for row in rows if new[row]}
        spans = [(work.starts[row], -(-ends[row] // GATHERED) * GATHERED) for row in rows]
        assert all(before[0] + before[1] == after[0] for before, after in pairwise(spans))
        assert sum(spans[-1]) <= 1024 and group.longest == max(ends[row] for row in rows)
    with pytest.raises(ValueError, match="does not fit"):
        plan([1], [1025], 1024)
