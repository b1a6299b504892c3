"""Plan -> tensors: one ragged batch, all rows' tokens end to end, with where each one's keys and values lie."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.plan import Plan, Row

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prefill row: its tokens lie at `first` to `last` of the batch and attend to the `end` places in `blocks`."""

    first: int
    last: int
    end: int
    blocks: Tensor  # [blocks] int64
    mask: (
        Tensor | None
    )  # [tokens, end] float32, 0 or -inf; None where the row starts its sequence, so that plain causality holds


@dataclass(frozen=True, slots=True)
class Batch:
    """A merge step's input. The first `decodes` tokens are decode rows of one token each; `chunks` hold the others.

    `slots` number the places of all pages: block * block_size + offset. `places` say what a token attends to, `positions` how
    it is turned: they differ where a prompt has parts. `tables` is padded with the null block,
    which is always zero; `mask` is None if all decode rows are equally long. `last` picks the tokens whose logits are
    needed, and `draw_row` says for each draw which of these it samples from.
    """

    tokens: Tensor  # [tokens] int64
    places: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    slots: Tensor  # [tokens] int64
    decodes: int
    longest: int  # of the decode rows, in tokens
    tables: Tensor  # [decodes * blocks of the longest] int64
    mask: Tensor | None  # [decodes, 1, 1, longest], 0 or -inf
    chunks: tuple[Chunk, ...]
    begun: Tensor  # [blocks] int64: blocks whose first position is written in this step
    last: Tensor  # [distinct rows drawn from] int64
    draw_row: Tensor  # [draws] int64


def build(plan: Plan, block_size: int, null: int, dtype: torch.dtype) -> Batch:
    """The decode mask comes in `dtype`, that of the pages; `null` is the number of the null block."""
    rows = plan.rows
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    ends = np.array([row.end for row in rows], dtype=np.int64)
    firsts = np.cumsum(lengths) - lengths  # where each row begins in the batch
    tables = _tables(rows, null)
    row_of = np.repeat(np.arange(len(rows)), lengths)
    places = np.arange(int(lengths.sum())) - (firsts - (ends - lengths))[row_of]
    slots = tables[row_of, places // block_size] * block_size + places % block_size
    decodes = int((np.cumprod(lengths == 1)).sum())
    longest = int(ends[:decodes].max(initial=0))
    last, draw_row = _drawn(plan, firsts + lengths - 1)
    return Batch(
        tokens=torch.from_numpy(np.fromiter((t for row in rows for t in row.tokens), np.int64, len(places))),
        places=torch.from_numpy(places),
        positions=torch.from_numpy(_positions(rows, firsts, places)),
        slots=torch.from_numpy(slots),
        decodes=decodes,
        longest=longest,
        tables=torch.from_numpy(tables[:decodes, : -(-longest // block_size)].flatten()),
        mask=_length_mask(ends[:decodes], longest, dtype),
        chunks=tuple(_chunk(rows[i], int(firsts[i]), tables[i], block_size) for i in range(decodes, len(rows))),
        begun=torch.from_numpy(_begun(tables, ends - lengths, ends, block_size)),
        last=last,
        draw_row=draw_row,
    )


def _positions(rows: tuple[Row, ...], firsts: Ints, places: Ints) -> Ints:
    positions = places.copy()
    for row, first in zip(rows, firsts, strict=True):
        if row.positions:
            positions[first : first + len(row.positions)] = row.positions
    return positions


def _tables(rows: tuple[Row, ...], null: int) -> Ints:
    tables = np.full((len(rows), max(len(row.blocks) for row in rows)), null, dtype=np.int64)
    for index, row in enumerate(rows):
        tables[index, : len(row.blocks)] = row.blocks
    return tables


def _begun(
    tables: Ints,
    starts: Ints,
    ends: Ints,
    block_size: int,
) -> Ints:
    """The rows' last blocks, where new: the only ones that are begun and may not be filled by this step."""
    final = (ends - 1) // block_size
    return tables[np.arange(len(ends)), final][final * block_size >= starts]


def _length_mask(ends: Ints, longest: int, dtype: torch.dtype) -> Tensor | None:
    if (ends == longest).all():
        return None
    hidden = torch.arange(longest) >= torch.from_numpy(ends).unsqueeze(1)  # [decodes, longest]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None, None, :]


def _chunk(row: Row, first: int, table: Ints, block_size: int) -> Chunk:
    mask = None
    if row.start:
        later = torch.arange(row.end) > torch.arange(row.start, row.end).unsqueeze(1)  # [tokens, end]
        mask = torch.zeros(later.shape).masked_fill_(later, -torch.inf)
    blocks = torch.from_numpy(table[: -(-row.end // block_size)].copy())
    return Chunk(first, first + len(row.tokens), row.end, blocks, mask)


def _drawn(plan: Plan, lasts: Ints) -> tuple[Tensor, Tensor]:
    drawn = np.array([draw.row for draw in plan.draws], dtype=np.int64)
    rows, draw_row = np.unique(drawn, return_inverse=True)
    return torch.from_numpy(lasts[rows]), torch.from_numpy(draw_row.astype(np.int64))
