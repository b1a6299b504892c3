"""A weight matrix as a checkpoint has it: dense, or in GGUF's 4-bit groups."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32  # columns that share a scale in GGUF's 4-bit forms


@dataclass(frozen=True, slots=True)
class Grouped:
    """A 4-bit matrix as GGUF has it: w = codes * scale + floor, with one scale and floor per 32 columns.

    codes [rows, columns] uint8 in 0..15, scale and floor [rows, columns / 32] float32.
    """

    codes: Tensor
    scale: Tensor
    floor: Tensor

    def rows(self, order: Tensor) -> "Grouped":
        return Grouped(self.codes[order], self.scale[order], self.floor[order])

    def dense(self) -> Tensor:
        groups = self.codes.view(*self.scale.shape, GROUP)  # [rows, groups, 32]
        return torch.addcmul(self.floor.unsqueeze(-1), groups, self.scale.unsqueeze(-1)).view(self.codes.shape)


Matrix = Tensor | Grouped


def dense(matrix: Matrix) -> Tensor:
    return matrix.dense() if isinstance(matrix, Grouped) else matrix


def stack(matrices: list[Matrix]) -> Matrix:
    """One matrix of all rows: a fused layer. Stays 4-bit if all are."""
    grouped = [m for m in matrices if isinstance(m, Grouped)]
    if len(grouped) < len(matrices):
        return torch.cat([dense(m) for m in matrices])
    codes, scales, floors = zip(*((m.codes, m.scale, m.floor) for m in grouped), strict=True)
    return Grouped(torch.cat(codes), torch.cat(scales), torch.cat(floors))
