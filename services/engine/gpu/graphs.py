"""CUDA graphs of decode steps: one for each padded number of rows, captured when it is first needed."""

from collections.abc import Callable

import torch
from torch import Tensor


def buckets(most: int) -> tuple[int, ...]:
    """Padded numbers of rows: close together where a step is short, 8 apart up to 256, 32 apart beyond."""
    sizes = (1, 2, 4, *range(8, 257, 8), *range(288, most + 32, 32))
    return (*(size for size in sizes if size < most), most)


class Graphs:
    """`compute(rows)` is what a decode step of so many (padded) rows does; its answer is a graph's output, in place."""

    def __init__(self, compute: Callable[[int], Tensor], most: int) -> None:
        self._compute, self.sizes = compute, buckets(most)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def padded(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)

    def run(self, rows: int) -> Tensor:
        """A step of so many padded rows. The first of a size runs as it is, and is captured while the device works on it."""
        if rows in self._graphs:
            graph, output = self._graphs[rows]
            graph.replay()
            return output
        answer = self._compute(rows)
        if answer.is_cuda:
            self._graphs[rows] = self._capture(rows)
        return answer

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)  # all share one: only one runs at a time
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            output = self._compute(rows)
        return graph, output
