"""An MLP's gate, up and activation on a GPU: a product and silu_mul, or for many tokens one kernel where that is faster."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.hopper_swiglu import serves, swiglu
from kernels.silu_mul import in_turns, silu_mul
from services.engine.gpu.product import Product
from services.engine.gpu.tune import BETTER, Measured, timed

TOKENS = (512, 1024, 2048, 4096, 8192)  # that are measured


class Gated(Measured):
    """silu(x · gateᵀ) * (x · upᵀ), made of rows of gate and then of up, each a multiple of 8."""

    def __init__(self, gate_up: Tensor, dtype: torch.dtype, form: type[Measured]) -> None:
        super().__init__(in_turns(gate_up), dtype)
        self.both = form(self.weight, dtype)
        self.counts = (*self.both.counts, *(TOKENS if form is Product and serves(self.weight) else ()))
        self.least: int | None = None  # tokens from which on the kernel is the faster way

    def product(self, x: Tensor) -> Tensor:
        if self.least is None or len(x) < self.least:
            return silu_mul(self.both(x))
        return swiglu(x, self.weight)

    def race(self, alike: Sequence["Gated"], rows: int) -> list[int]:
        if rows in self.both.counts:
            return self.both.race([form.both for form in alike], rows)
        x = torch.randn(rows, self.weight.shape[1], dtype=self.dtype, device=self.weight.device)

        def apart() -> None:
            for form in alike:
                silu_mul(form.both(x))

        def fused() -> None:
            for form in alike:
                swiglu(x, form.weight)

        return [rows] if timed(fused) < BETTER * timed(apart) else []

    def choose(self, rows: int, found: list[int]) -> None:
        if rows in self.both.counts:
            self.both.choose(rows, found)
        elif not found:
            self.least = None
        elif self.least is None:
            self.least = rows
