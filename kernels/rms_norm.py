"""RMS norm of a residual stream: whole, and its factor alone, which a product's consumer applies where it reads the product.

    residual [tokens, hidden]   any row stride
    weight   [hidden]
    out      [tokens, hidden]   residual * factor * weight, in float32 until it is stored
    factor   float32 [tokens]   1 / sqrt(mean(residual²) + eps)

A product's rows are linear in its input's, so norm(residual) · Wᵀ = factor * (residual · (W * weight)ᵀ): with the weight in
the matrix, all that is left of a norm before a product is one factor a token behind it.
Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4


def reference(residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return residual.double() * reference_factor(residual, eps).unsqueeze(1) * weight.double()


def reference_factor(residual: Tensor, eps: float) -> Tensor:
    """[tokens] float64"""
    return torch.rsqrt(residual.double().square().mean(-1) + eps)


@triton.jit
def factor_of(residual, hidden, eps, BLOCK: tl.constexpr):
    """One token's, in whatever kernel needs it; in kernels of equally many warps, the same to the bit."""
    at = tl.arange(0, BLOCK)
    value = tl.load(residual + at, mask=at < hidden, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)


@triton.jit
def _factor(residual, out, hidden, eps, residual_row, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    tl.store(out + token, factor_of(residual + token * residual_row, hidden, eps, BLOCK))


@triton.jit
def _rms_norm(residual, weight, out, hidden, eps, residual_row, out_row, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(residual + token * residual_row + at, mask=at < hidden, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=at < hidden, other=0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / hidden + eps) * scale
    tl.store(out + token * out_row + at, normed.to(out.dtype.element_ty), mask=at < hidden)


def factor(residual: Tensor, eps: float) -> Tensor:
    """[tokens] float32"""
    tokens, hidden = residual.shape
    out = torch.empty(tokens, dtype=torch.float32, device=residual.device)
    _factor[(tokens,)](residual, out, hidden, eps, residual.stride(0), triton.next_power_of_2(hidden), num_warps=WARPS)
    return out


def rms_norm(residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normed residual."""
    tokens, hidden = residual.shape
    out = torch.empty(tokens, hidden, dtype=residual.dtype, device=residual.device)
    block = triton.next_power_of_2(hidden)
    _rms_norm[(tokens,)](residual, weight, out, hidden, eps, residual.stride(0), out.stride(0), block, num_warps=WARPS)
    return out
