"""Attention of one step: decode rows by one kernel, prefill chunks by another, over tables gathered once for all layers."""

import torch
from torch import Tensor

from kernels import decode_attention as decode
from kernels import decode_pieces as cut
from kernels import prefill_attention as prefill
from kernels.embed import gather_tables
from services.engine.gpu.inputs import FEW_ROWS, Arrays, Step, Tables
from services.engine.spec import ModelSpec


class Attention:
    """Scratch memory for steps of up to `max_rows` rows whose contexts have up to `room` tokens.

    `invariant`: decode rows, too, are chunks that read pages in place, so that how a token was computed does not matter.
    """

    def __init__(self, spec: ModelSpec, max_rows: int, blocks: int, room: int, dtype: torch.dtype, device: torch.device,
                 invariant: bool) -> None:  # fmt: skip
        self.scale, self.invariant = spec.head_dim**-0.5, invariant
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        rows = max_rows + 1  # one more, of padding
        self.pack = decode.packed(spec.heads // spec.kv_heads)
        self._spare = decode.scratch(rows, spec.heads, spec.kv_heads, spec.head_dim, device)
        self._room = prefill.scratch(room, spec.kv_heads, spec.head_dim, dtype, device)
        self._row_tables = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self._drawn_tables = torch.zeros_like(self._row_tables)

    def begin(self, arrays: Arrays, step: Step, tables: Tables, block_size: int) -> None:
        """Gather the block tables of a step's rows, and cut their contexts into pieces for decode attention."""
        self._arrays, self._step = arrays, step
        gather_tables(arrays.slot_of[: step.rows], arrays.ends[: step.rows], tables.all, self._row_tables, block_size)
        if not step.all_drawn:
            slots, ends = arrays.drawn_slots[: step.drawn], arrays.drawn_ends[: step.drawn]
            gather_tables(slots, ends, tables.all, self._drawn_tables, block_size)
        if n := step.decodes:
            alike = FEW_ROWS[-1] if step.packed and n > FEW_ROWS[0] else n  # fewer ways to split, of kernels to compile
            self._pieces = cut.schedule(arrays.decode_ends[:n], cut.splits_for(alike))
        if not self.invariant:
            ends = arrays.ends[: step.rows] if step.all_drawn else arrays.drawn_ends[: step.drawn]
            self._drawn_pieces = cut.schedule(ends, cut.splits_for(len(ends)))

    def all(self, query: Tensor, page: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> the same, contiguous; the pages hold the step's own keys and values already."""
        arrays, step = self._arrays, self._step
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if n := step.decodes:  # what is no decode row gets nonsense here, and its answer below
            rows = self._row_tables[:n]
            if step.packed:
                self._decode(query, page, rows, self._pieces, out, arrays.firsts[: n + 1])
            else:
                self._decode(query[:n], page, rows, self._pieces, out[:n])
        tables, firsts, ends = self._row_tables[: step.rows], arrays.firsts[: step.rows + 1], arrays.chunk_ends[: step.rows]
        tiles, starts = arrays.tiles[: 2 * step.tiles].view(-1, 2), arrays.starts[: step.rows]
        if step.groups is None:
            alone = self.invariant and step.tiles == step.tokens
            return prefill.prefill_in_place(query, page, tables, firsts, ends, tiles, out, self.scale, self.invariant, alone)
        return prefill.prefill_attention(
            query, page, tables, firsts, ends, tiles, starts, step.groups, out, self._room, self.scale
        )

    def drawn(self, query: Tensor, page: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> [drawn, heads, head_dim]: only the tokens that are drawn from."""
        arrays, step = self._arrays, self._step
        drawn, tables = arrays.drawn[: step.drawn], self._drawn_tables[: step.drawn]
        if self.invariant:
            return self.all(query, page)[drawn]
        if step.all_drawn:
            tables = self._row_tables[: step.rows]
        else:
            query = query[drawn]
        return self._decode(
            query, page, tables, self._drawn_pieces, torch.empty(query.shape, dtype=query.dtype, device=query.device)
        )

    def _decode(
        self, query: Tensor, page: Tensor, tables: Tensor, pieces: cut.Pieces, out: Tensor, firsts: Tensor | None = None
    ) -> Tensor:
        return decode.decode_attention(query, page, tables, pieces, out, self._spare, self.scale, self.processors, firsts)
