"""The Llama family on a GPU, on one ragged batch. T tokens, H heads, K key/value heads, D head_dim; residuals as the weights.

No norm is computed before a product: its weight is in the matrix (build.py), and its factor, one number a token, is applied by
whoever reads the product, from the residual itself. Products of residuals that no norm has made small need bfloat16's range.
Decode rows and prefill chunks are one batch in every linear layer and part only inside attention. In the last layer, only the
tokens that are drawn from go on behind the keys and values: each of them attends alone, as a decode row does.
"""

import torch
from torch import Tensor

from kernels.embed import embed
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from services.engine.gpu.attend import Attention
from services.engine.gpu.inputs import Arrays, Step, Tables
from services.engine.spec import ModelSpec
from services.engine.weights import Layer, Parameters


class Llama:
    """Holds parameters only; the step and the pages are given. A layer changes the residual [T, hidden] in place."""

    def __init__(self, spec: ModelSpec, parameters: Parameters[Tensor], positions: int) -> None:
        self.spec, self.parameters = spec, parameters
        angles = torch.outer(torch.arange(positions, device=parameters.frequencies.device), parameters.frequencies)
        self.turns = torch.stack((angles.cos(), angles.sin()), dim=-1)  # [positions, D / 2, 2] float32

    def hidden(self, arrays: Arrays, step: Step, tables: Tables, newest: Tensor, pages: Tensor, attention: Attention) -> Tensor:
        """[rows drawn from, hidden], normed, for the head; writes the step's keys and values into the pages."""
        parts = arrays.ids, arrays.rows, arrays.places, arrays.positions
        ids, rows, places, positions = (part[: step.tokens] for part in parts)
        layers = self.parameters.layers
        residual, slots = embed(
            ids, rows, places, arrays.slot_of, newest, tables.all, self.parameters.embedding, pages.shape[2]
        )
        attention.begin(arrays, step, tables, pages.shape[2])
        for layer, page in zip(layers[:-1], pages, strict=False):
            query = self.project(residual, layer, positions, slots, page)
            residual = self.mlp(layer.out(attention.all(query, page).flatten(1), onto=residual), layer)
        query = self.project(residual, layers[-1], positions, slots, pages[-1])
        if not step.all_drawn:
            residual = residual[arrays.drawn[: step.drawn]]
        residual = self.mlp(layers[-1].out(attention.drawn(query, pages[-1]).flatten(1), onto=residual), layers[-1])
        return rms_norm(residual, self.parameters.norm, self.spec.rms_eps)

    def project(self, residual: Tensor, layer: Layer[Tensor], positions: Tensor, slots: Tensor, page: Tensor) -> Tensor:
        """The queries [T, H, D], turned; keys and values go into the pages."""
        qkv = layer.qkv(residual)
        rope(qkv, residual, positions, self.turns, slots, page, layer.qkv_bias, layer.qk_norm, self.spec.rms_eps)
        return qkv[:, : self.spec.heads * self.spec.head_dim].view(len(qkv), self.spec.heads, self.spec.head_dim)

    def mlp(self, residual: Tensor, layer: Layer[Tensor]) -> Tensor:
        return layer.down(layer.gate_up(residual), onto=residual)
