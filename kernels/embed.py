"""A step's input on the device: token ids (the newest drawn ones included), embeddings, page slots and block tables by row.

ids       int32 [tokens]                -1: the token drawn last in the row's slot
rows      int32 [tokens]                which row a token belongs to
places    int32 [tokens]                how many tokens of its row lie before it
slot_of   int32 [rows]                  the slot of each row's sequence
newest    int32 [slots]                 the token drawn last in each slot
tables    int32 [slots, blocks]         the block table of each slot
embedding [vocab, hidden]
x         [tokens, hidden]              out: embedding of each token
slots     int64 [tokens]                out: block * block_size + offset of each token's place
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def reference(
    ids: Tensor, rows: Tensor, places: Tensor, slot_of: Tensor, newest: Tensor, tables: Tensor, embedding: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x, slots) in plain torch."""
    slot = slot_of[rows.long()].long()
    known = torch.where(ids >= 0, ids, newest[slot]).long()
    blocks = tables[slot, (places // block_size).long()].long()
    return embedding[known], blocks * block_size + (places % block_size).long()


@triton.jit
def _embed(
    ids, rows, places, slot_of, newest, tables, embedding, x, slots, hidden, table_row, block_size, embedding_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slot_of + tl.load(rows + token))
    id = tl.load(ids + token)
    if id < 0:
        id = tl.load(newest + slot)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(embedding + id.to(tl.int64) * embedding_row + at, mask=at < hidden, other=0.0)
    tl.store(x + token.to(tl.int64) * hidden + at, value, mask=at < hidden)
    if tl.program_id(1) == 0:
        place = tl.load(places + token)
        block = tl.load(tables + slot.to(tl.int64) * table_row + place // block_size)
        tl.store(slots + token, block.to(tl.int64) * block_size + place % block_size)


@triton.jit
def _gather_tables(slot_of, ends, tables, out, table_row, out_row, block_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    used = tl.cdiv(tl.load(ends + row), block_size)
    source = tables + tl.load(slot_of + row).to(tl.int64) * table_row
    for start in range(0, used, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + row.to(tl.int64) * out_row + at, tl.load(source + at, mask=at < used), mask=at < used)


def embed(
    ids: Tensor, rows: Tensor, places: Tensor, slot_of: Tensor, newest: Tensor, tables: Tensor, embedding: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x, slots)."""
    tokens, hidden = len(ids), embedding.shape[1]
    x = torch.empty(tokens, hidden, dtype=embedding.dtype, device=embedding.device)
    slots = torch.empty(tokens, dtype=torch.int64, device=embedding.device)
    _embed[(tokens, triton.cdiv(hidden, 1024))](
        ids, rows, places, slot_of, newest, tables, embedding, x, slots, hidden, tables.stride(0), block_size,
        embedding.stride(0), 1024, num_warps=4,
    )  # fmt: skip
    return x, slots


def gather_tables(slot_of: Tensor, ends: Tensor, tables: Tensor, out: Tensor, block_size: int) -> Tensor:
    """`out` [rows, blocks]: the tables of the slots `slot_of`, as far as `ends` tokens reach; the rest stays as it was."""
    _gather_tables[(len(slot_of),)](slot_of, ends, tables, out, tables.stride(0), out.stride(0), block_size, 128, num_warps=4)
    return out
