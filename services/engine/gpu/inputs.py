"""Plan -> tensors: what a step needs to know, written to pinned memory and sent to the device in one copy.

The device's arrays never move, so a CUDA graph that was captured over them computes whatever step they describe.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.prefill_attention import QUERIES, Group
from kernels.prefill_attention import plan as lay_out
from services.engine.gpu.transfer import send, staging
from services.engine.plan import Plan, Row

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Arrays:
    """One step's arrays, on the host as views of a pinned buffer or on the device. R rows, of which D are drawn from.

    ids [tokens]: -1 is the token drawn last in the row's slot. rows, positions [tokens]. slot_of, ends [R]: a row's slot, and
    how many tokens its context has (0: padding). drawn, drawn_slots, drawn_ends [D]: the last token of each row that is drawn
    from, and again its slot and context. firsts [chunks + 1]: where the chunks begin, from the first chunk on. tiles [any, 2],
    starts [chunks]: as kernels/prefill_attention.py lays out its work.
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor
    slot_of: Tensor
    ends: Tensor
    drawn: Tensor
    drawn_slots: Tensor
    drawn_ends: Tensor
    firsts: Tensor
    starts: Tensor
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The sizes of a step whose arrays are on the device. The first `decodes` tokens are decode rows of one token each."""

    tokens: int
    rows: int
    decodes: int
    drawn: int  # rows that are drawn from
    groups: tuple[Group, ...] = ()  # of chunks, for prefill attention

    @property
    def chunks(self) -> int:
        return self.rows - self.decodes

    @property
    def all_drawn(self) -> bool:
        """Every token is drawn from: a step of decode rows."""
        return self.drawn == self.tokens


class Inputs:
    """`max_rows` rows, `max_tokens` tokens at most; slot number `max_rows` is nobody's, for padding.

    `room`: tokens whose keys and values prefill attention can have side by side.
    """

    def __init__(self, max_rows: int, max_tokens: int, room: int, ahead: int, device: torch.device) -> None:
        self.max_rows, self.room = max_rows, room
        tiles = max_tokens // QUERIES + max_rows
        self._sizes = (max_tokens,) * 3 + (max_rows,) * 5 + (max_rows + 1, max_rows, 2 * tiles)
        self._device = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        # A buffer is written again only when the step it was sent for has been answered.
        self._staged = [staging(self._device) for _ in range(ahead + 1)]
        self._turn = 0
        self.arrays = Arrays(*self._device.split(self._sizes))

    def fill(self, plan: Plan, padded_rows: int) -> Step:
        """Describe a plan, with padding up to `padded_rows` rows if all are decode rows. Asynchronous."""
        self._turn = (self._turn + 1) % len(self._staged)
        staged = self._staged[self._turn]
        views = [part.numpy() for part in staged.split(self._sizes)]
        step = self._write(views, plan, padded_rows)
        self._device.copy_(staged, non_blocking=True)
        return step

    def pad(self, rows: int) -> Step:
        """A step of padding alone."""
        return self.fill(Plan((), (), ()), rows)

    def _write(self, views: list[Ints], plan: Plan, padded_rows: int) -> Step:
        ids, rows, positions, slot_of, ends, drawn, drawn_slots, drawn_ends, firsts, starts, tiles = views
        lengths = np.fromiter((len(row.tokens) for row in plan.rows), np.int32, len(plan.rows))
        decodes = int(np.cumprod(lengths == 1).sum())
        count = len(plan.rows)
        slot_of[:count] = [row.slot for row in plan.rows]
        ends[:count] = [row.end for row in plan.rows]
        begin = np.cumsum(lengths) - lengths
        tokens = int(lengths.sum())
        ids[:decodes] = [row.tokens[0] for row in plan.rows[:decodes]]
        rows[:tokens] = np.repeat(np.arange(count, dtype=np.int32), lengths)
        positions[:tokens] = np.arange(tokens, dtype=np.int32) + np.repeat(ends[:count] - lengths - begin, lengths)
        for row, at in zip(plan.rows[decodes:], begin[decodes:], strict=True):
            ids[at : at + len(row.tokens)] = row.tokens
        distinct = sorted({draw.row for draw in plan.draws})
        drawn[: len(distinct)] = (begin + lengths - 1)[distinct]
        drawn_slots[: len(distinct)] = slot_of[distinct]
        drawn_ends[: len(distinct)] = ends[distinct]
        firsts[: count - decodes + 1] = np.append(begin[decodes:], tokens) - decodes
        if decodes == count and padded_rows >= count:
            self._pad(views, count, padded_rows)
            return Step(padded_rows, padded_rows, padded_rows, padded_rows)
        work = lay_out(lengths[decodes:].tolist(), ends[decodes:count].tolist(), self.room)
        tiles[: 2 * len(work.tiles)] = [at for tile in work.tiles for at in tile]
        starts[: len(work.starts)] = work.starts
        return Step(tokens, count, decodes, len(distinct), tuple(work.groups))

    def _pad(self, views: list[Ints], count: int, padded: int) -> None:
        ids, rows, positions, slot_of, ends, drawn, drawn_slots, drawn_ends, *_ = views
        gap = slice(count, padded)
        ids[gap] = positions[gap] = ends[gap] = drawn_ends[gap] = 0
        slot_of[gap] = drawn_slots[gap] = self.max_rows
        rows[gap] = drawn[gap] = np.arange(count, padded, dtype=np.int32)


class Tables:
    """Block tables by slot, on the device; only what a device has not been told yet is sent."""

    def __init__(self, slots: int, blocks: int, device: torch.device) -> None:
        self.all = torch.zeros(slots + 1, blocks, dtype=torch.int32, device=device)
        self._flat = self.all.view(-1)

    def update(self, rows: Iterable[Row]) -> None:
        width = self.all.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for row in rows:
            if row.told < len(row.blocks):
                places += range(row.slot * width + row.told, row.slot * width + len(row.blocks))
                blocks += row.blocks[row.told :]
        if places:
            news = send(torch.tensor([places, blocks]), self.all.device)
            self._flat[news[0]] = news[1].int()
