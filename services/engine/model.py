"""The Llama family on one ragged batch. T tokens, H heads, K key/value heads, D head_dim; residuals are float32."""

import torch
from torch import Tensor

from services.engine.attention import Attention, LayerPages, NativeAttention, Pages
from services.engine.batch import Batch
from services.engine.form import gate
from services.engine.layers import Layers
from services.engine.norm import Norm
from services.engine.spec import ModelSpec
from services.engine.weights import Layer, Parameters


class Llama:
    """Logits of a merge step. Holds parameters only; the batch and the pages are given.

    Rows are picked by `index_select`: indexing wakes the library's own threads even for eight of them, and these then spin on
    a core that our kernels' helper needs.

    `together` does all layers at once, where it can, for steps of decode rows.
    """

    def __init__(self, spec: ModelSpec, parameters: Parameters[Norm], together: Layers | None = None) -> None:
        self.spec, self.parameters, self.together = spec, parameters, together

    def __call__(self, batch: Batch, pages: Pages) -> Tensor:
        """[rows drawn from, vocab] float32; writes the batch's keys and values into the pages."""
        x = self.parameters.embedding.index_select(0, batch.tokens).float()  # [T, hidden]
        turn = turns(batch.positions, self.parameters.frequencies)  # [T, 1, D / 2]
        attention = pages.attention(batch, turn)
        x = self.layers(x, attention, pages)
        return self.parameters.head(x.index_select(0, batch.last), self.parameters.norm).float()

    def layers(self, x: Tensor, attention: Attention, pages: Pages) -> Tensor:
        if self.together is not None and isinstance(attention, NativeAttention) and not attention.batch.chunks:
            program = self.together.program(len(x))
            if program is not None:
                return self.together.run(program, x, attention.step)
        for layer, layer_pages in zip(self.parameters.layers, pages.layers, strict=True):
            x = self.attend(x, layer, attention, layer_pages)
            x = layer.down(layer.gate_up(x, layer.mlp_norm), gate, x)
        return x

    def attend(self, x: Tensor, layer: Layer[Norm], attention: Attention, pages: LayerPages) -> Tensor:
        spec = self.spec
        qkv = layer.qkv(x, layer.attention_norm)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        heads = qkv.float().view(len(x), -1, spec.head_dim)  # [T, H + 2K, D]
        if layer.qk_norm is not None:
            qk = heads[:, : -spec.kv_heads]
            qk.copy_(layer.qk_norm(qk))
        return layer.out(attention(heads, pages), onto=x)


def turns(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[T, 1, D / 2] complex: the turn of each pair at each position."""
    angles = positions.unsqueeze(1) * frequencies
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
