"""Linear layers on a GPU: the library's product, and for very few rows the faster of it and our own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.gemv import gemv
from kernels.matmul import matmul
from services.engine.gpu.tune import BETTER, Measured, timed

Tile = tuple[int, int, int]  # columns out, columns in, warps of a program
TILES: tuple[Tile, ...] = ((4, 512, 4), (8, 512, 4), (4, 1024, 4), (16, 256, 4))


class Product(Measured):
    """x · weightᵀ in `dtype`. `tiles`: by number of rows, where our own product is the faster one."""

    counts = (1, 2, 4)  # that our own product takes

    def __init__(self, weight: Tensor, dtype: torch.dtype, adds: bool = False) -> None:
        super().__init__(weight, dtype, adds)
        self.tiles: dict[int, Tile] = {}

    def product(self, x: Tensor) -> Tensor:
        tile = self.tiles.get(len(x))
        if tile is not None:
            return gemv(x, self.weight, self.dtype, tile)
        if x.dtype == self.dtype:
            return linear(x, self.weight)
        return torch.mm(x, self.weight.t(), out_dtype=self.dtype)

    def add(self, x: Tensor, onto: Tensor) -> Tensor:
        tile = self.tiles.get(len(x))
        if tile is not None:
            return gemv(x, self.weight, self.dtype, tile, onto)
        return onto.addmm_(x, self.weight.t())

    def race(self, alike: Sequence["Product"], rows: int) -> list[int]:
        x = torch.randn(rows, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        onto = x.new_zeros(rows, len(self.weight)) if self.adds else None
        best, chosen = BETTER * timed(lambda: [form(x, onto=onto) for form in alike]), []
        for tile in TILES:
            took = timed(lambda tile=tile: [gemv(x, form.weight, form.dtype, tile, onto) for form in alike])  # type: ignore[misc]
            if took < best:
                best, chosen = took, list(tile)
        return chosen

    def choose(self, rows: int, found: list[int]) -> None:
        if found:
            columns, depth, warps = found
            self.tiles[rows] = columns, depth, warps


class Fixed(Measured):
    """A layer whose answer to a row is the same, bit for bit, whatever the other rows are: there is nothing to choose."""

    def product(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight, self.dtype)

    def add(self, x: Tensor, onto: Tensor) -> Tensor:
        return matmul(x, self.weight, self.dtype, onto)
