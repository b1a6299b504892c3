"""The gated activation of an MLP: silu(gate) * up.

    both     [tokens, 2 * wide]   gate and up in turns of 8 columns: 8 of gate, the same 8 of up; any row stride
    residual [tokens, hidden]     what both is a product of; gate and up are both times its rms_norm.py's factor
    out      [tokens, wide]       gate * sigmoid(gate) * up, in float32 until it is stored

In turns, because hopper_swiglu.py computes both and this in one where that is faster, from the same weights.
Shazeer, "GLU Variants Improve Transformer" (2020).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rms_norm import WARPS, factor_of

TURN = tl.constexpr(8)
COLUMNS = 2048  # that a program writes: fewer would read the token's residual more often


def in_turns(gate_up: Tensor) -> Tensor:
    """Rows of gate, then of up [2 * wide, hidden] -> the same rows in turns; wide must be a multiple of 8."""
    wide, hidden = gate_up.shape[0] // 2, gate_up.shape[1]
    return gate_up.view(2, wide // TURN.value, TURN.value, hidden).transpose(0, 1).reshape(2 * wide, hidden)


def reference(both: Tensor, factor: Tensor) -> Tensor:
    """factor [tokens]"""
    normed = both.double() * factor.double().unsqueeze(1)
    gate, up = (part.flatten(1) for part in normed.view(len(both), -1, 2, TURN.value).unbind(2))
    return gate * gate.sigmoid() * up


@triton.jit
def _silu_mul(both, residual, out, wide, hidden, eps, both_row, residual_row, out_row,
              COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < wide
    place = both + token * both_row + at // TURN * (2 * TURN) + at % TURN
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + TURN, mask=inside, other=0.0).to(tl.float32)
    factor = factor_of(residual + token * residual_row, hidden, eps, BLOCK)
    gate, up = gate * factor, up * factor
    tl.store(out + token * out_row + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(both: Tensor, residual: Tensor, eps: float) -> Tensor:
    """[tokens, wide]"""
    tokens, wide, hidden = both.shape[0], both.shape[1] // 2, residual.shape[1]
    out = torch.empty(tokens, wide, dtype=both.dtype, device=both.device)
    _silu_mul[(tokens, triton.cdiv(wide, COLUMNS))](
        both, residual, out, wide, hidden, eps, both.stride(0), residual.stride(0), out.stride(0), COLUMNS,
        triton.next_power_of_2(hidden), num_warps=WARPS,
    )  # fmt: skip
    return out
