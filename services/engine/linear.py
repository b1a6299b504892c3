"""Linear layers y = x Wᵀ on a CPU, in several forms."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.cpu import grouped
from kernels.cpu.team import Task
from services.engine.form import Before, Form, gate, plain
from services.engine.matrix import GROUP, Grouped, Matrix, dense
from services.engine.norm import Norm


class Native(Form):
    """Our own kernel, weights in groups of 32: 4-bit ones as they are, others in 8 bits; what comes before is part of it."""

    def __init__(self, matrix: Matrix) -> None:
        if isinstance(matrix, Grouped):
            self.weight = grouped.four(matrix.codes, matrix.scale, matrix.floor)
        else:
            self.weight = grouped.eight(matrix.float())

    def __call__(self, x: Tensor, before: Before = plain, onto: Tensor | None = None) -> Tensor:
        x = x.float()
        if isinstance(before, Norm):
            return self.weight(x, "norm", onto, before.weight, before.eps)
        if before is gate:
            return self.weight(x, "gate", onto)
        return self.weight(before(x), "plain", onto)

    def task(self, x: Tensor, y: Tensor, room: Tensor, before: Before = plain, keep: bool = False) -> Task:
        """Part of a program: into y, or added to it."""
        if isinstance(before, Norm):
            return self.weight.task(x, "norm", y, room, keep, before.weight, before.eps)
        return self.weight.task(x, "gate" if before is gate else "plain", y, room, keep, None, 0.0)


class Dense(Form):
    """A plain matrix product in the weight's own type."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        self.weight = dense(matrix).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight)


class Int4(Form):
    """GGUF's 4-bit groups, multiplied as they are with bfloat16 activations: the only fast path of torch's kernel.

    torch computes (code - 8) * scale + zero, so zero = floor + 8 * scale. Both are rounded to bfloat16, which moves a
    weight by at most 2^-9 of (7 |scale| + |zero|): within a quarter of the 4-bit step itself.
    """

    def __init__(self, matrix: Grouped) -> None:
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.codes.to(torch.int32), 1)
        zero = matrix.floor + 8 * matrix.scale
        scale_zero = torch.stack((matrix.scale.t(), zero.t()), dim=-1)  # [groups, rows, 2]
        self.scale_zero = scale_zero.bfloat16().contiguous()

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self.packed, GROUP, self.scale_zero)
        return y


def _int4(matrix: Matrix) -> Form:
    assert isinstance(matrix, Grouped), "only a matrix in 4-bit groups has this form"
    return Int4(matrix)


FORMS: dict[str, Callable[[Matrix], Form]] = {
    "native": Native,
    "float32": lambda matrix: Dense(matrix, torch.float32),
    "bfloat16": lambda matrix: Dense(matrix, torch.bfloat16),
    "int4": _int4,
}
