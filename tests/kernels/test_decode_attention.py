"""Decode attention against float64: every page size and head shape, lengths that hurt, and what a row may not depend on."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.decode_attention import PACKED, decode_attention, packed, reference, scratch
from kernels.decode_pieces import Splits, schedule, splits_for
from kernels.prefill_attention import reference as several
from tests.kernels.paged import error, filled, random

SPLITS = Splits(64, 4)


def run(query: Tensor, pages: Tensor, tables: Tensor, lengths: list[int], splits: Splits = SPLITS, programs: int = 1) -> Tensor:
    kv_heads = pages.shape[2] // 2
    spare = scratch(len(lengths), query.shape[1], kv_heads, query.shape[2], query.device)
    spare.partial.fill_(float("nan"))
    spare.weights.fill_(float("nan"))
    out = torch.full(query.shape, float("nan"), dtype=query.dtype, device=query.device)
    pieces = schedule(torch.tensor(lengths, dtype=torch.int32, device=query.device), splits)
    decode_attention(query, pages, tables, pieces, out, spare, query.shape[2] ** -0.5, programs)
    assert not spare.arrivals.any(), "the next launch counts from zero"
    return out


def check(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    pages, tables = filled(lengths, block_size, kv_heads, head_dim, dtype, device)
    query = random(len(lengths), heads, head_dim, dtype=dtype, device=device)
    on_device = torch.tensor(lengths, device=device)
    wanted = reference(query.double(), pages.double(), tables, on_device, head_dim**-0.5)
    assert error(run(query, pages, tables, lengths), wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 128), (16, 64), (16, 96), (32, 128)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (17, 1)])
def test_shapes(block_size: int, head_dim: int, heads: int, kv_heads: int, device: torch.device) -> None:
    """One token, an empty row, a page's edges, a piece's edges, a prime, and more pieces than there may be."""
    check([1, 0, block_size - 1, block_size + 1, 64, 67, 311], heads, kv_heads, head_dim, block_size, torch.float16, device)


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_lengths(lengths: list[int], device: torch.device) -> None:
    check(lengths, 4, 2, 64, 16, torch.float32 if device.type == "cpu" else torch.bfloat16, device)


@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (4, 4), (6, 1), (17, 1)], ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_rows_of_several_tokens(heads: tuple[int, int], device: torch.device, data: st.DataObject) -> None:
    """Each sees what is before it, and itself; in one piece or many, of which it may see nothing. Empty rows write nothing."""
    (heads_, kv_heads), head_dim, block_size = heads, 64, 8
    pack = packed(heads_ // kv_heads)
    counts = data.draw(st.lists(st.integers(0, pack), min_size=1, max_size=4))
    ends = [count and count + data.draw(st.integers(0, 300) | st.sampled_from([64 - count, 63, 65, 62, 0])) for count in counts]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    pages, tables = filled(ends, block_size, kv_heads, head_dim, dtype, device)
    query = random(sum(counts) + 2, heads_, head_dim, dtype=dtype, device=device)  # of which two are nobody's
    firsts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
    lengths = torch.tensor(ends, dtype=torch.int32, device=device)
    spare = scratch(max(len(ends), 16), heads_, kv_heads, head_dim, device)
    spare.partial.fill_(float("nan"))
    spare.weights.fill_(float("nan"))
    out = torch.full(query.shape, 7.0, dtype=dtype, device=device)
    decode_attention(query, pages, tables, schedule(lengths, SPLITS), out, spare, head_dim**-0.5, 2, firsts)
    used = sum(counts)
    wanted = several(query[:used].double(), pages.double(), tables, firsts, lengths, head_dim**-0.5)
    assert error(out[:used], wanted) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert (out[used:] == 7).all() and not spare.arrivals.any()


def test_strides(device: torch.device) -> None:
    """Queries out of a fused projection, pages of one layer among several, tables wider than this batch needs."""
    lengths = [130, 5]
    pages, tables = filled(lengths, 16, 2, 64, torch.float16, device)
    apart = torch.full((len(pages), 3, *pages.shape[1:]), float("nan"), dtype=pages.dtype, device=device)
    apart[:, 1] = pages
    wide = torch.full((len(tables), 40), -1, dtype=torch.int32, device=device)
    wide[:, : tables.shape[1]] = tables
    query = random(2, 12, 64, dtype=torch.float16, device=device)[:, 4:8]
    assert torch.equal(run(query, apart[:, 1], wide, lengths), run(query.contiguous(), pages, tables, lengths))


def test_a_row_depends_on_itself_alone(device: torch.device) -> None:
    """Bit for bit: alone, among others, and on any number of programs."""
    lengths = [301, 64, 0, 199]
    pages, tables = filled(lengths, 16, 2, 64, torch.float16, device)
    query = random(4, 8, 64, dtype=torch.float16, device=device)
    together = run(query, pages, tables, lengths)
    for row, length in enumerate(lengths):
        alone = run(query[row : row + 1], pages, tables[row : row + 1], [length], programs=3)
        assert torch.equal(together[row], alone[0])


def test_pieces_cover_every_row(device: torch.device) -> None:
    """In order, each but a row's last as long as the policy says, longer ones where there may be no more of them."""
    lengths = [0, 1, 64, 65, 1000, 256]
    table = schedule(torch.tensor(lengths, dtype=torch.int32, device=device), SPLITS).table.tolist()
    count, records = table[0][0], table[1:]
    assert [record[0] // 4 for record in records[:count]] == [0, 1, 2, 3, 3, *[4] * 4, *[5] * 4]
    assert [record[3] for record in records[:count]] == [1, 1, 1, 2, 2, *[4] * 8]
    spans = [(first, last) for _, first, last, _ in records[:count]]
    assert spans[:5] == [(0, 0), (0, 1), (0, 64), (0, 64), (64, 65)]
    assert spans[5:9] == [(0, 256), (256, 512), (512, 768), (768, 1000)]
    assert spans[9:] == [(0, 64), (64, 128), (128, 192), (192, 256)]


@pytest.mark.parametrize("rows", [1, 16, 17, 48, 49, 64, 512])
def test_scratch_holds_every_policy(rows: int) -> None:
    for room in (rows, 512):
        tokens = PACKED if rows <= 64 else 1
        assert rows * splits_for(rows).most * tokens <= len(scratch(room, 1, 1, 1, torch.device("cpu")).partial)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    pages, tables = filled([3], 16, 2, 64, torch.float16, device)
    query = random(1, 4, 64, dtype=torch.float16, device=device)
    lengths = torch.tensor([3], dtype=torch.int32, device=device)
    spare = scratch(1, 8, 2, 64, device)
    with pytest.raises(ValueError, match="does not fit 4/2 heads"):
        decode_attention(query, pages, tables, schedule(lengths, SPLITS), torch.empty_like(query), spare, 1.0, 5)
    with pytest.raises(ValueError, match="do not fit"):
        pieces = schedule(lengths, Splits(64, 8192))
        decode_attention(query, pages, tables, pieces, torch.empty_like(query), scratch(1, 4, 2, 64, device), 1.0, 5)
    with pytest.raises(ValueError, match="rows begin"):
        decode_attention(
            query,
            pages,
            tables,
            schedule(lengths, SPLITS),
            torch.empty_like(query),
            scratch(1, 4, 2, 64, device),
            1.0,
            5,
            lengths,
        )
    with pytest.raises(ValueError, match="power of two"):
        Splits(64, 3)
