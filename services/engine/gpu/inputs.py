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

# Padded numbers of rows of a step with prefill, where the most is not needed; the last row is padding. In steps of so few rows,
# decode rows may have several tokens: scratch memory is for so many.
FEW_ROWS = (8, 64)
SPARE_TILES = 8  # of a padded step: rows that fill their last tile in part
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Arrays:
    """One step's arrays on the device. R rows, of which D are drawn from.

    ids [tokens]: -1 is the token drawn last in the row's slot. rows [tokens]. places, positions [tokens]: what a token attends
    to, and how it is turned. slot_of, ends [R]: a row's slot, and
    how many tokens its context has. decode_ends, chunk_ends [R]: the same, each for its own kind of row, else 0. drawn,
    drawn_slots, drawn_ends [D]: the last token of each row that is drawn from, its slot and context. firsts [R + 1]: where the
    rows begin. starts [R], tiles [any, 2]: as kernels/prefill_attention.py lays out its work. Rows beyond the plan's are
    padding: no context, nobody's slot.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    positions: Tensor
    slot_of: Tensor
    ends: Tensor
    decode_ends: Tensor
    chunk_ends: Tensor
    drawn: Tensor
    drawn_slots: Tensor
    drawn_ends: Tensor
    firsts: Tensor
    starts: Tensor
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The sizes of a step whose arrays are on the device; with padding, one stands for many and can be a CUDA graph.

    `decodes`: the rows, from the first, that decode attention looks at: of one token each, or, `packed`, of few. `groups` are
    for prefill attention; None: in place.
    """

    tokens: int
    rows: int
    decodes: int
    drawn: int  # rows that are drawn from
    tiles: int
    groups: tuple[Group, ...] | None = None
    packed: bool = False

    @property
    def all_drawn(self) -> bool:
        """Every token is drawn from: a step of decode rows."""
        return not self.tiles and self.drawn == self.tokens


class Inputs:
    """`max_rows` rows, `max_tokens` tokens at most; slot number `max_rows` is nobody's, for padding.

    `room`: tokens whose keys and values prefill attention can have side by side. `pack`: tokens that a decode row may have,
    where rows are few. `invariant`: decode rows are chunks, too.
    """

    def __init__(
        self, max_rows: int, max_tokens: int, room: int, ahead: int, device: torch.device, pack: int, invariant: bool = False
    ) -> None:
        self.max_rows, self.room, self.pack, self.invariant = max_rows, room, pack, invariant
        rows, tiles = max_rows + 1, max_tokens // QUERIES + max_rows + SPARE_TILES
        self._sizes = (max_tokens,) * 4 + (rows,) * 7 + (rows + 1, rows, 2 * tiles)
        self._device = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        # A buffer is written again only when the step it was sent for has been answered.
        self._staged = [staging(self._device) for _ in range(ahead + 1)]
        self._turn = 0
        self.arrays = Arrays(*self._device.split(self._sizes))

    def fill(self, plan: Plan, padded: Step | None) -> Step:
        """Describe a plan, padded to a step's sizes if one is given. Asynchronous."""
        self._turn = (self._turn + 1) % len(self._staged)
        staged = self._staged[self._turn]
        views = [part.numpy() for part in staged.split(self._sizes)]
        step = self._write(views, plan, padded)
        self._device.copy_(staged, non_blocking=True)
        return step

    def clear(self) -> None:
        """A step of padding alone: no row has a context, and what is written goes to block 0."""
        self._device.zero_()
        self.arrays.slot_of.fill_(self.max_rows)

    def _write(self, views: list[Ints], plan: Plan, padded: Step | None) -> Step:
        ids, rows, places, positions, slot_of, ends, decode_ends, chunk_ends, *drawing, firsts, starts, tiles = views
        drawn, drawn_slots, drawn_ends = drawing
        lengths = np.fromiter((len(row.tokens) for row in plan.rows), np.int32, len(plan.rows))
        count, tokens = len(plan.rows), int(lengths.sum())
        pack = self.pack if count < FEW_ROWS[-1] else 1
        decodes = 0 if self.invariant else int(np.cumprod(lengths <= pack).sum())
        begin = np.cumsum(lengths) - lengths
        slot_of[:count] = [row.slot for row in plan.rows]
        ends[:count] = [row.end for row in plan.rows]
        decode_ends[:decodes] = ends[:decodes]
        singles = int(np.cumprod(lengths == 1).sum())
        ids[:singles] = [row.tokens[0] for row in plan.rows[:singles]]
        for row, at in zip(plan.rows[singles:], begin[singles:].tolist(), strict=True):
            ids[at : at + len(row.tokens)] = row.tokens
        rows[:tokens] = np.repeat(np.arange(count, dtype=np.int32), lengths)
        places[:tokens] = np.arange(tokens, dtype=np.int32) + np.repeat(ends[:count] - lengths - begin, lengths)
        positions[:tokens] = places[:tokens]
        for at in [at for at, row in enumerate(plan.rows) if row.positions]:
            positions[begin[at] : begin[at] + lengths[at]] = plan.rows[at].positions
        firsts[:count], firsts[count] = begin, tokens
        distinct = sorted({draw.row for draw in plan.draws})
        drawn[: len(distinct)] = (begin + lengths - 1)[distinct]
        drawn_slots[: len(distinct)], drawn_ends[: len(distinct)] = slot_of[distinct], ends[distinct]
        new, whole = lengths.copy(), ends[:count].copy()
        new[:decodes] = whole[:decodes] = 0
        chunk_ends[:count] = whole
        work = lay_out(new.tolist(), whole.tolist(), self.room)
        starts[:count] = work.starts
        tiles[: 2 * len(work.tiles)] = [at for tile in work.tiles for at in tile]
        groups, packed = None if self.invariant else tuple(work.groups), decodes > singles
        step = Step(tokens, count, decodes, len(distinct), len(work.tiles), groups, packed)
        if padded is None:
            return step
        self._pad(views, step, padded)
        return padded

    def _pad(self, views: list[Ints], step: Step, padded: Step) -> None:
        ids, rows, places, positions, slot_of, ends, decode_ends, chunk_ends, *drawing, firsts, _, tiles = views
        drawn, drawn_slots, drawn_ends = drawing
        beyond = slice(step.tokens, padded.tokens)
        ids[beyond] = places[beyond] = positions[beyond] = 0
        rows[step.tokens : padded.tokens] = padded.rows - 1
        slot_of[step.rows : padded.rows] = self.max_rows
        ends[step.rows : padded.rows] = chunk_ends[step.rows : padded.rows] = decode_ends[step.decodes : padded.rows] = 0
        firsts[step.rows : padded.rows + 1] = step.tokens
        drawn_slots[step.drawn : padded.drawn] = self.max_rows
        drawn[step.drawn : padded.drawn] = drawn_ends[step.drawn : padded.drawn] = 0
        tiles[2 * step.tiles : 2 * padded.tiles : 2], tiles[2 * step.tiles + 1 : 2 * padded.tiles : 2] = padded.rows - 1, 0


class Tables:
    """Block tables by slot, on the device; only what a device has not been told yet is sent."""

    def __init__(self, slots: int, blocks: int, device: torch.device) -> None:
        self.all = torch.zeros(slots + 1, blocks, dtype=torch.int32, device=device)
        self._flat = self.all.view(-1)

    def update(self, rows: Iterable[Row]) -> None:
        width = self.all.shape[1]
        news = [row for row in rows if row.told < len(row.blocks)]
        if news:
            places = [np.arange(row.slot * width + row.told, row.slot * width + len(row.blocks)) for row in news]
            blocks = [np.array(row.blocks[row.told :]) for row in news]
            sent = send(np.stack((np.concatenate(places), np.concatenate(blocks))), self.all.device)
            self._flat[sent[0]] = sent[1].int()
