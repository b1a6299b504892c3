"""The Llama family on a GPU, on one ragged batch. T tokens, H heads, K key/value heads, D head_dim; residuals as the weights.

Decode rows and prefill chunks are one batch in every linear layer and part only inside attention. In the last layer, only the
tokens that are drawn from go on behind the keys and values: each of them attends alone, as a decode row does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.embed import embed
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from services.engine.gpu.attend import Attention
from services.engine.gpu.inputs import Arrays, Step, Tables
from services.engine.spec import ModelSpec
from services.engine.weights import Layer, Parameters


@dataclass(frozen=True, slots=True)
class NormWeight:
    weight: Tensor
    eps: float


class Llama:
    """Holds parameters only; the step and the pages are given."""

    def __init__(self, spec: ModelSpec, parameters: Parameters[NormWeight], positions: int) -> None:
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
        x = rms_norm(residual, layers[0].attention_norm.weight, self.spec.rms_eps)
        for layer, page, following in zip(layers[:-1], pages, layers[1:], strict=False):
            query = self.project(x, layer, positions, slots, page)
            x = self.mlp(layer.out(attention.all(query, page).flatten(1)), residual, layer)
            x = rms_norm(residual, following.attention_norm.weight, self.spec.rms_eps, x)
        return self.last(x, residual, positions, slots, arrays, step, pages[-1], attention)

    def project(self, x: Tensor, layer: Layer[NormWeight], positions: Tensor, slots: Tensor, page: Tensor) -> Tensor:
        """The queries [T, H, D], turned; keys and values go into the pages."""
        qkv = layer.qkv(x)
        norms = None if layer.qk_norm is None else layer.qk_norm.weight
        rope(qkv, positions, self.turns, slots, page, layer.qkv_bias, norms, self.spec.rms_eps)
        return qkv[:, : self.spec.heads * self.spec.head_dim].view(len(qkv), self.spec.heads, self.spec.head_dim)

    def mlp(self, x: Tensor, residual: Tensor, layer: Layer[NormWeight]) -> Tensor:
        """What the layer's second half adds; `x` is what its first half added."""
        x = rms_norm(residual, layer.mlp_norm.weight, self.spec.rms_eps, x)
        added: Tensor = layer.down(layer.gate_up(x))
        return added

    def last(self, x: Tensor, residual: Tensor, positions: Tensor, slots: Tensor, arrays: Arrays, step: Step,
             page: Tensor, attention: Attention) -> Tensor:  # fmt: skip
        layer = self.parameters.layers[-1]
        query = self.project(x, layer, positions, slots, page)
        if not step.all_drawn:
            residual = residual[arrays.drawn[: step.drawn]]
        x = self.mlp(layer.out(attention.drawn(query, page).flatten(1)), residual, layer)
        return rms_norm(residual, self.parameters.norm.weight, self.spec.rms_eps, x)
