"""The gated activation of an MLP: silu(gate) * up.

    both [tokens, 2 * wide]   gate, then up; any row stride
    out  [tokens, wide]       gate * sigmoid(gate) * up, in float32 until it is stored

Shazeer, "GLU Variants Improve Transformer" (2020).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def reference(both: Tensor) -> Tensor:
    gate, up = both.double().chunk(2, dim=1)
    return gate * gate.sigmoid() * up


@triton.jit
def _silu_mul(both, out, wide, both_row, out_row, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < wide
    gate = tl.load(both + token * both_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + token * both_row + wide + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_row + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(both: Tensor) -> Tensor:
    tokens, wide = both.shape[0], both.shape[1] // 2
    out = torch.empty(tokens, wide, dtype=both.dtype, device=both.device)
    block = 1024 if tokens <= 64 else 2048
    _silu_mul[(tokens, triton.cdiv(wide, block))](both, out, wide, both.stride(0), out.stride(0), block, num_warps=4)
    return out
