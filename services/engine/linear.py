"""Linear layers y = x Wᵀ + b in several forms, and the weights they are made from.

Which form is fastest depends on the machine and on how many rows x has, so `choose` measures (see calibrate.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

GROUP = 32


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


Form = Callable[[Tensor], Tensor]  # [rows, columns in] of any float type -> [rows, columns out] of a float type


class Dense:
    """A plain matrix product in the weight's own type."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        self.weight = dense(matrix).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight)


class Int4:
    """GGUF's 4-bit groups, multiplied as they are with bfloat16 activations: the only fast path of torch's kernel.

    torch computes (code - 8) * scale + zero, so zero = floor + 8 * scale. Both are rounded to bfloat16, which moves a
    weight by at most 2^-9 of (7 |scale| + |zero|): within a quarter of the 4-bit step itself.
    """

    def __init__(self, matrix: Grouped) -> None:
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.codes.to(torch.int32), 1)
        zero = matrix.floor + 8 * matrix.scale
        scale_zero = torch.stack((matrix.scale.t(), zero.t()), dim=-1)  # [groups, rows, 2]
        self.scale_zero = scale_zero.bfloat16().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.packed, GROUP, self.scale_zero)
        return y


class Int8:
    """8-bit weights (a scale per row) times 8-bit activations (a scale per token), summed exactly in int32.

    For checkpoints that are quantized already: llama.cpp rounds activations to 8 bits too.
    """

    def __init__(self, matrix: Matrix) -> None:
        weight = dense(matrix).float()
        self.scale = torch.linalg.vector_norm(weight, torch.inf, dim=1).clamp_(min=1e-12).div_(127)  # [columns out]
        self.weight = weight.div_(self.scale.unsqueeze(1)).round_().to(torch.int8).t()  # [columns in, columns out]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_(min=1e-12).div_(127)  # [rows, 1]
        codes = x.div(scale).round_().to(torch.int8)
        return torch._int_mm(codes, self.weight).mul(self.scale).mul_(scale)
