"""An MLP's gate, up and activation on a GPU: a product and silu_mul, or for many tokens one kernel where that is faster."""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.hopper_swiglu import serves, swiglu
from kernels.rms_norm import factor
from kernels.silu_mul import in_turns, silu_mul
from services.engine.gpu.product import Product
from services.engine.gpu.tune import BETTER, Measured, timed

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # that are measured: each stands for those below it, the last for more


class Gated(Measured):
    """silu(x · gateᵀ) * (x · upᵀ), made of rows of gate and then of up, each a multiple of 8; `eps` is of the norm before."""

    def __init__(self, gate_up: Tensor, dtype: torch.dtype, form: type[Measured], eps: float) -> None:
        super().__init__(in_turns(gate_up), dtype)
        self.both, self.eps = form(self.weight, dtype), eps
        self.counts = (*self.both.counts, *(TOKENS if form is Product and serves(self.weight) else ()))
        self.fused: set[int] = set()  # of TOKENS, where the kernel is the faster way

    def product(self, x: Tensor) -> Tensor:
        if TOKENS[min(bisect_left(TOKENS, len(x)), len(TOKENS) - 1)] in self.fused:
            return self.together(x)
        return self.apart(x)

    def together(self, x: Tensor) -> Tensor:
        return swiglu(x, factor(x, self.eps), self.weight)

    def apart(self, x: Tensor) -> Tensor:
        return silu_mul(self.both(x), x, self.eps)

    def race(self, alike: Sequence["Gated"], rows: int) -> list[int]:
        if rows in self.both.counts:
            return self.both.race([form.both for form in alike], rows)
        x = torch.randn(rows, self.weight.shape[1], dtype=self.dtype, device=self.weight.device)
        together = timed(lambda: [form.together(x) for form in alike])
        return [rows] if together < BETTER * timed(lambda: [form.apart(x) for form in alike]) else []

    def choose(self, rows: int, found: list[int]) -> None:
        if rows in self.both.counts:
            self.both.choose(rows, found)
        elif found:
            self.fused.add(rows)
