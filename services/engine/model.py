"""The Llama family on one ragged batch. T tokens, H heads, K key/value heads, D head_dim; residuals are float32."""

import math

import torch
from torch import Tensor
from torch.nn.functional import silu

from services.engine.attention import Pages, attention, write
from services.engine.batch import Batch
from services.engine.spec import ModelSpec
from services.engine.weights import Layer, Parameters


class Llama:
    """Logits of a merge step. Holds parameters only; the batch and the pages are given."""

    def __init__(self, spec: ModelSpec, parameters: Parameters) -> None:
        self.spec = spec
        self.parameters = parameters

    def __call__(self, batch: Batch, pages: Pages) -> Tensor:
        """[rows drawn from, vocab] float32; writes the batch's keys and values into the pages."""
        x = self.parameters.embedding[batch.tokens].float()  # [T, hidden]
        turn = turns(batch.positions, self.parameters.frequencies)  # [T, 1, D / 2]
        for index, layer in enumerate(self.parameters.layers):
            x = x + self.attend(
                norm(x, layer.attention_norm, self.spec.rms_eps), layer, batch, turn, pages.layer(index)
            )
            x = x + self.mlp(norm(x, layer.mlp_norm, self.spec.rms_eps), layer)
        x = norm(x[batch.last], self.parameters.norm, self.spec.rms_eps)  # [rows drawn from, hidden]
        return self.parameters.head(x).float()

    def attend(self, x: Tensor, layer: Layer, batch: Batch, turn: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        spec = self.spec
        qkv = layer.qkv(x)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        heads = qkv.view(len(x), -1, spec.head_dim)  # [T, H + 2K, D]
        qk, v = heads[:, : -spec.kv_heads], heads[:, -spec.kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            weight = torch.cat((layer.q_norm.expand(spec.heads, -1), layer.k_norm.expand(spec.kv_heads, -1)))
            qk = norm(qk.float(), weight, spec.rms_eps)
        qk = rotate(qk, turn)
        q, k = qk[:, : spec.heads], qk[:, spec.heads :]  # [T, H, D], [T, K, D]
        write(pages, batch.slots, k, v)
        out = attention(q, pages, batch)  # [T, H, D]
        return layer.out(out.reshape(len(x), -1))

    def mlp(self, x: Tensor, layer: Layer) -> Tensor:
        gate, up = layer.gate_up(x).chunk(2, dim=1)  # [T, intermediate] each
        return layer.down(silu(gate).mul_(up))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, x / sqrt(mean(x²) + eps) * weight, in few calls: |x|² is size * mean(x²)."""
    size = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.div(torch.hypot(length, length.new_tensor(math.sqrt(size * eps)))).mul_(weight * math.sqrt(size))


def turns(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[T, 1, D / 2] complex: the turn of each pair at each position."""
    angles = positions.unsqueeze(1) * frequencies
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding: a pair of neighbours is a complex number, its rotation one product. [T, heads, D] float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)
