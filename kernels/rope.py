"""Rotary embedding of queries and keys, and the new keys and values put into their pages.

    qkv       [tokens, (heads + 2 * kv_heads) * head_dim]   query heads, key heads, value heads; queries turn in place
    residual  [tokens, hidden]                              what qkv is a product of: its factor (rms_norm.py) comes first
    positions int32 [tokens]
    turns     float32 [positions, head_dim / 2, 2]          cos and sin of each pair's angle at each position
    slots     int64 [tokens]                                block * block_size + offset, where a token's keys and values go
    pages     [blocks, block_size, 2 * kv_heads, head_dim]  one layer: key heads first, then value heads
    bias      [(heads + 2 * kv_heads) * head_dim] or None   added next (Qwen 2)
    norms     [heads + kv_heads, head_dim] or None          weights of an RMS norm over each head, before turning (Qwen 3)

A pair is two neighbours: (a, b) becomes (a cos - b sin, a sin + b cos). Su et al., "RoFormer" (2021).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rms_norm import WARPS, factor_of

FEW = 128  # tokens up to which a program takes 16 heads and not 64: then more of them work, each of which reads the residual


def reference(
    qkv: Tensor, factor: Tensor, positions: Tensor, turns: Tensor, kv_heads: int, bias: Tensor | None, norms: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """[tokens, heads + 2 * kv_heads, head_dim] float64: turned queries and keys, and values. factor [tokens]."""
    size = 2 * turns.shape[1]
    normed = qkv.double() * factor.double().unsqueeze(1)
    wide = (normed if bias is None else normed + bias.double()).view(len(qkv), -1, size)
    turned, values = wide[:, :-kv_heads], wide[:, -kv_heads:]
    if norms is not None:
        turned = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + eps) * norms.double()
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
    angle = torch.view_as_complex(turns[positions.long()].double()).unsqueeze(1)
    return torch.cat((torch.view_as_real(pairs * angle).flatten(-2), values), dim=1)


@triton.jit
def _rope(
    qkv, residual, positions, turns, slots, pages, bias, norms, heads, hidden, eps, qkv_row, residual_row, page_stride,
    token_stride, block_size, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    inside = (head < heads + 2 * KV_HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    at = head[:, None] * HEAD_DIM + d[None, :]
    value = tl.load(qkv + token * qkv_row + at, mask=inside, other=0.0).to(tl.float32)
    pair = tl.arange(0, DIM // 2)
    angle = turns + tl.load(positions + token).to(tl.int64) * HEAD_DIM + 2 * pair
    cos = tl.load(angle, mask=2 * pair < HEAD_DIM, other=1.0)[None, :]
    sin = tl.load(angle + 1, mask=2 * pair < HEAD_DIM, other=0.0)[None, :]
    slot = tl.load(slots + token)  # all loads before the factor, where warps wait for each other
    value *= factor_of(residual + token * residual_row, hidden, eps, BLOCK)
    if BIAS:
        value += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    turning = (head < heads + KV_HEADS)[:, None]
    if NORMS:
        scale = tl.load(norms + at, mask=inside & turning, other=0.0).to(tl.float32)
        normed = value * tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + eps)[:, None] * scale
        value = tl.where(turning, normed, value)
    a, b = tl.split(tl.reshape(value, (HEADS, DIM // 2, 2)))
    turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, DIM))
    value = tl.where(turning, turned, value).to(qkv.dtype.element_ty)
    tl.store(qkv + token * qkv_row + at, value, mask=inside & (head < heads)[:, None])
    page = pages + (slot // block_size) * page_stride + (slot % block_size) * token_stride
    tl.store(page + at - heads * HEAD_DIM, value, mask=inside & (head >= heads)[:, None])


def rope(
    qkv: Tensor, residual: Tensor, positions: Tensor, turns: Tensor, slots: Tensor, pages: Tensor,
    bias: Tensor | None, norms: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Heads of a page must be contiguous. `eps` is that of all norms."""
    block_size, kv_heads, size = pages.shape[1], pages.shape[2] // 2, pages.shape[3]
    if pages.stride(2) != size or pages.stride(3) != 1 or qkv.stride(1) != 1:
        raise ValueError("the heads of a page, and a token of qkv, must be contiguous")
    all_heads = qkv.shape[1] // size
    each = 16 if qkv.shape[0] <= FEW else 64  # heads a program
    none = turns  # a pointer that is never read
    _rope[(qkv.shape[0], triton.cdiv(all_heads, each))](
        qkv, residual, positions, turns, slots, pages, none if bias is None else bias, none if norms is None else norms,
        all_heads - 2 * kv_heads, residual.shape[1], eps, qkv.stride(0), residual.stride(0), pages.stride(0), pages.stride(1),
        block_size, kv_heads, size, triton.next_power_of_2(size), each, triton.next_power_of_2(residual.shape[1]),
        bias is not None, norms is not None, num_warps=WARPS,
    )  # fmt: skip
