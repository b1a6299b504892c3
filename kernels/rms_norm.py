"""RMS norm of a residual stream, with the addition that comes before it.

    x        [tokens, hidden]   what a layer adds; any row stride
    residual [tokens, hidden]   updated in place: residual + x, rounded to its own type
    weight   [hidden]
    out      [tokens, hidden]   residual / sqrt(mean(residual²) + eps) * weight, in float32 until it is stored

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def reference(residual: Tensor, weight: Tensor, eps: float, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, new residual) in plain torch; the sum is rounded as the residual is kept."""
    total = residual if x is None else (residual.double() + x.double()).to(residual.dtype)
    wide = total.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double(), total


@triton.jit
def _norm(value, weight, eps, hidden):
    return value * tl.rsqrt(tl.sum(value * value, 0) / hidden + eps) * weight


@triton.jit
def _rms_norm(residual, weight, out, hidden, eps, residual_row, out_row, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    value = tl.load(residual + token * residual_row + at, mask=inside, other=0.0).to(tl.float32)
    normed = _norm(value, tl.load(weight + at, mask=inside, other=0.0).to(tl.float32), eps, hidden)
    tl.store(out + token * out_row + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(x, residual, weight, out, hidden, eps, x_row, residual_row, out_row, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(residual + token * residual_row + at, mask=inside, other=0.0)
    added = tl.load(x + token * x_row + at, mask=inside, other=0.0).to(tl.float32)
    total = (kept.to(tl.float32) + added).to(kept.dtype)
    tl.store(residual + token * residual_row + at, total, mask=inside)
    normed = _norm(total.to(tl.float32), scale, eps, hidden)
    tl.store(out + token * out_row + at, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(residual: Tensor, weight: Tensor, eps: float, x: Tensor | None = None) -> Tensor:
    """The normed residual; with `x`, the residual takes it in first, in place."""
    tokens, hidden = residual.shape
    out = torch.empty(tokens, hidden, dtype=residual.dtype, device=residual.device)
    block = triton.next_power_of_2(hidden)
    warps = min(max(block // 512, 1), 16)
    if x is None:
        _rms_norm[(tokens,)](residual, weight, out, hidden, eps, residual.stride(0), out.stride(0), block, num_warps=warps)
        return out
    _add_rms_norm[(tokens,)](
        x, residual, weight, out, hidden, eps, x.stride(0), residual.stride(0), out.stride(0), block, num_warps=warps
    )
    return out
