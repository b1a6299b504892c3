"""CUDA graphs of steps: one for each padded size, captured when it is first needed.

Starting a step kernel by kernel takes the host some milliseconds, however short the step is. So decode steps, and prefill steps
that the device would finish sooner than that, are padded to one of few sizes and started as one graph. Sizes that are not
captured yet are served kernel by kernel, and captured while the device works on them; those that nobody has needed yet are
captured after the start, whenever there is nothing to run.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.prefill_attention import QUERIES
from services.engine.gpu.inputs import FEW_ROWS, SPARE_TILES, Step
from services.engine.plan import Plan
from services.engine.spread import leading


def row_sizes(most: int) -> list[int]:
    """Padded numbers of decode rows: close together where a step is short, 8 apart up to 256, 32 apart beyond."""
    return [size for size in (1, 2, 4, *range(8, 257, 8), *range(288, most, 32)) if size < most] + [most]


def token_sizes(most: int) -> list[int]:
    """Padded numbers of tokens of a step with prefill, about 6 % apart; the least is what a found prefix leaves."""
    sizes = (16, *range(64, 1025, 64), *range(1280, 2049, 256), *range(2560, most, 512))
    return [size for size in sizes if size < most] + [most]


def _prefill_step(tokens: int, rows: int) -> Step:
    packed, rows = rows <= FEW_ROWS[-1], min(rows, tokens)
    return Step(tokens, rows, rows, rows, tokens // QUERIES + SPARE_TILES, packed=packed)


class Graphs:
    """`compute` is what a step does; its answer is a graph's output, in place. `pack`, `invariant`: as of the inputs."""

    def __init__(
        self, compute: Callable[[Step], Tensor], max_rows: int, max_tokens: int, pack: int, invariant: bool = False
    ) -> None:
        self._compute, self._max_rows, self._pack, self._invariant = compute, max_rows, pack, invariant
        self._rows, self._tokens = row_sizes(max_rows), token_sizes(max_tokens)
        self._all = tuple(self._sizes())
        self._graphs: dict[Step, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def padded(self, plan: Plan) -> Step | None:
        """The sizes of the graph that computes a plan; None: it is better started kernel by kernel."""
        tokens, rows = plan.tokens, len(plan.rows)
        if tokens == rows == len({draw.row for draw in plan.draws}):
            return self._decode_step(self._rows[bisect_left(self._rows, rows)])
        room = max(tokens, rows + 1)  # the tiles that are too many are those of a row of padding
        if room > self._tokens[-1] or self._invariant:
            return None
        few = next((most for most in FEW_ROWS if rows < most <= self._max_rows), self._max_rows + 1)
        step = _prefill_step(self._tokens[bisect_left(self._tokens, room)], few)
        chunks = plan.rows[leading(plan.rows, self._pack if step.packed else 1) :]
        needed = sum(-(-len(row.tokens) // QUERIES) for row in chunks)
        return step if needed <= step.tiles else None

    def _decode_step(self, rows: int) -> Step:
        """In invariant steps a decode row is a chunk, of one tile."""
        return Step(rows, rows, 0, rows, rows) if self._invariant else Step(rows, rows, rows, rows, 0)

    def missing(self) -> Step | None:
        """A size that is not captured yet. Decode steps go first, and the largest: its memory serves the smaller ones."""
        return next((step for step in self._all if step not in self._graphs), None)

    def __len__(self) -> int:
        return len(self._graphs)

    def _sizes(self) -> Iterator[Step]:
        yield from (self._decode_step(size) for size in reversed(self._rows))
        most = (self._max_rows + 1, *(few for few in FEW_ROWS if few <= self._max_rows))
        if not self._invariant:
            yield from (_prefill_step(size, rows) for size in reversed(self._tokens) for rows in most)

    def run(self, step: Step) -> Tensor:
        """A padded step. The first of its size runs as it is, and is captured while the device works on it."""
        if step in self._graphs:
            graph, output = self._graphs[step]
            graph.replay()
            return output
        answer = self._compute(step)
        if answer.is_cuda:
            self._graphs[step] = self._capture(step)
        return answer

    def _capture(self, step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Not torch.cuda.graph(): it waits for the device, collects garbage and empties caches each time.
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)  # all share one: only one runs at a time
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may bring pages, or pin memory
        output = self._compute(step)
        graph.capture_end()
        return graph, output
