"""Checkpoint -> parameters: every tensor taken once, q, k, v and gate, up fused, rotary pairs put side by side."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.checkpoint import Checkpoint
from services.engine.linear import Form, Grouped, Matrix, dense, stack
from services.engine.norm import Norm
from services.engine.spec import BadModel, ModelSpec

Maker = Callable[[Matrix], Form]


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Norm  # [hidden]
    qkv: Form  # hidden -> (heads + 2 kv_heads) * head_dim
    qkv_bias: Tensor | None
    qk_norm: Norm | None  # [heads + kv_heads, head_dim]
    out: Form  # heads * head_dim -> hidden
    mlp_norm: Norm
    gate_up: Form  # hidden -> 2 * intermediate
    down: Form  # intermediate -> hidden


@dataclass(frozen=True, slots=True)
class Parameters:
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Norm
    head: Form  # hidden -> vocab
    frequencies: Tensor  # [head_dim / 2], radians per position


class Taker:
    """Hands out a checkpoint's tensors, checked by shape, and knows what was left over. Raises BadModel."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.left = dict(checkpoint.tensors)

    def matrix(self, name: str, *shape: int) -> Matrix:
        if name not in self.left:
            raise BadModel(f"the model lacks the tensor {name}; download it again or choose another")
        value = self.left.pop(name)()
        found = tuple((value.codes if isinstance(value, Grouped) else value).shape)
        if found != shape:
            raise BadModel(f"tensor {name} has shape {found} where the configuration says {shape}; download it again")
        return value

    def vector(self, name: str, size: int) -> Tensor:
        return dense(self.matrix(name, size)).float()

    def finish(self, spec: ModelSpec) -> None:
        """Hubs may also store what is derived: a tied head, and (in old files) each layer's rotary frequencies."""
        derived = {"lm_head.weight"} if spec.tied else set()
        extra = [n for n in self.left if n not in derived and not n.endswith(".rotary_emb.inv_freq")]
        if extra:
            raise BadModel(f"the model has {len(extra)} unknown tensors, first {extra[0]}; choose another model")


def load(checkpoint: Checkpoint, make: Maker, make_head: Maker, dtype: torch.dtype) -> Parameters:
    """Read all parameters; `make` builds each linear layer, `make_head` the last; the embedding is kept in `dtype`."""
    spec, take = checkpoint.spec, Taker(checkpoint)
    embedding = dense(take.matrix("model.embed_tokens.weight", spec.vocab_size, spec.hidden))
    head = embedding if spec.tied else take.matrix("lm_head.weight", spec.vocab_size, spec.hidden)
    frequencies = torch.tensor(spec.frequencies, dtype=torch.float32)
    if "rope_factors" in take.left:
        frequencies = frequencies / take.vector("rope_factors", spec.head_dim // 2)
    layers = tuple(_layer(take, spec, make, index, paired=checkpoint.paired) for index in range(spec.layers))
    norm = Norm(take.vector("model.norm.weight", spec.hidden), spec.rms_eps)
    take.finish(spec)
    return Parameters(embedding.to(dtype), layers, norm, make_head(head), frequencies)


def _layer(take: Taker, spec: ModelSpec, make: Maker, index: int, *, paired: bool) -> Layer:
    at, hidden, wide = f"model.layers.{index}.", spec.hidden, spec.intermediate
    order = torch.arange(spec.head_dim) if paired else _pairs(spec.head_dim)
    return Layer(
        attention_norm=Norm(take.vector(at + "input_layernorm.weight", hidden), spec.rms_eps),
        qkv=make(_qkv(take, spec, at, order)),
        qkv_bias=_bias(take, spec, at, order) if spec.qkv_bias else None,
        qk_norm=_qk_norm(take, spec, at, order) if spec.qk_norm else None,
        out=make(take.matrix(at + "self_attn.o_proj.weight", hidden, spec.heads * spec.head_dim)),
        mlp_norm=Norm(take.vector(at + "post_attention_layernorm.weight", hidden), spec.rms_eps),
        gate_up=make(stack([take.matrix(f"{at}mlp.{n}_proj.weight", wide, hidden) for n in ("gate", "up")])),
        down=make(take.matrix(at + "mlp.down_proj.weight", hidden, wide)),
    )


def _pairs(head_dim: int) -> Tensor:
    """The order that puts dimension i and i + head_dim / 2, which hubs rotate together, side by side."""
    return torch.arange(head_dim).view(2, -1).t().flatten()


def _every_head(order: Tensor, heads: int) -> Tensor:
    return (torch.arange(heads).unsqueeze(1) * order.numel() + order).flatten()


def _qkv(take: Taker, spec: ModelSpec, at: str, order: Tensor) -> Matrix:
    """Rows of q and k reordered, which leaves their products, and the columns of each 4-bit group, as they are."""
    parts: list[Matrix] = []
    for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
        part = take.matrix(f"{at}self_attn.{name}_proj.weight", heads * spec.head_dim, spec.hidden)
        rows = _every_head(order, heads)
        parts.append(part if name == "v" else part.rows(rows) if isinstance(part, Grouped) else part[rows])
    return stack(parts)


def _qk_norm(take: Taker, spec: ModelSpec, at: str, order: Tensor) -> Norm:
    q, k = (take.vector(f"{at}self_attn.{name}_norm.weight", spec.head_dim)[order] for name in "qk")
    return Norm(torch.cat((q.expand(spec.heads, -1), k.expand(spec.kv_heads, -1))), spec.rms_eps)


def _bias(take: Taker, spec: ModelSpec, at: str, order: Tensor) -> Tensor:
    q, k, v = (
        take.vector(f"{at}self_attn.{name}_proj.bias", heads * spec.head_dim)
        for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
    )
    return torch.cat((q[_every_head(order, spec.heads)], k[_every_head(order, spec.kv_heads)], v))
