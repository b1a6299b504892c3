"""Linear layers y = x Wᵀ on a CPU, in several forms."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.cpu import grouped
from kernels.cpu.team import Task
from services.engine.form import Before, Form, gate, plain
from services.engine.matrix import GROUP, Grouped, Matrix, dense
from services.engine.norm import Norm

BLOCK = 64  # columns that a Hadamard turn mixes, at most
TINY = 1e-12  # keeps a row of zeros from dividing by zero


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


class Int8(Form):
    """8-bit weights (a scale per row) times 8-bit activations (a scale per token), summed exactly in int32.

    For checkpoints that are quantized already. A few columns of x are far larger than the rest and would take the scale
    for themselves, so both sides are first turned by a Hadamard matrix in blocks of 64 columns, which spreads them and
    leaves the product as it is (QuaRot, arXiv 2404.00456). On SmolLM2 in Q4_1 the logits' relative error is 0.05; it is
    0.035 where activations are rounded in groups of 32, as llama.cpp does, and 0.12 without the turn.
    """

    def __init__(self, matrix: Matrix) -> None:
        weight = dense(matrix).float()
        self.turn = _hadamard(min(BLOCK, weight.shape[1] & -weight.shape[1]))
        weight = self._turned(weight)
        self.scale = weight.abs().amax(1).clamp_(min=TINY).div_(127)  # [columns out]
        self.zero = torch.zeros(len(weight), dtype=torch.int64)
        codes = weight.div_(self.scale.unsqueeze(1)).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)

    def _turned(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, len(self.turn)) @ self.turn).view(x.shape)

    def product(self, x: Tensor) -> Tensor:
        x = self._turned(x.float())
        scale = x.abs().amax(1, keepdim=True).clamp_min_(TINY).div_(127)  # [rows, 1]
        codes = x.div_(scale).add_(128.5).to(torch.uint8)  # the cast cuts off: the code + 128
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )  # the dot product instruction takes unsigned activations
        return y.mul_(scale)


def _hadamard(size: int) -> Tensor:
    """Orthogonal and symmetric [size, size], by Sylvester's doubling; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(size)


def _int4(matrix: Matrix) -> Form:
    assert isinstance(matrix, Grouped), "only a matrix in 4-bit groups has this form"
    return Int4(matrix)


@functools.cache
def int8_is_exact() -> bool:
    """Processors without a dot product instruction add pairs in 16 bits, which cuts off what is too large for these."""
    columns = 64
    packed = torch.ops.onednn.qlinear_prepack(torch.full((8, columns), 127, dtype=torch.int8), None)
    x, scale, zero = torch.full((4, columns), 255, dtype=torch.uint8), torch.ones(8), torch.zeros(8, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return bool((y == 255 * 127 * columns).all())


FORMS: dict[str, Callable[[Matrix], Form]] = {
    "native": Native,
    "float32": lambda matrix: Dense(matrix, torch.float32),
    "bfloat16": lambda matrix: Dense(matrix, torch.bfloat16),
    "int8": Int8,
    "int4": _int4,
}
