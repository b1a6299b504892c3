"""Checkpoint -> parameters: every tensor taken once, q, k, v and gate, up fused, rotary pairs put side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from services.engine.checkpoint import Checkpoint
from services.engine.form import Form
from services.engine.matrix import Grouped, Matrix, dense, stack
from services.engine.spec import BadModel, ModelSpec

Maker = Callable[[Matrix], Form]
NormedMaker = Callable[[Matrix, Tensor], Form]
Norm = TypeVar("Norm")


@dataclass(frozen=True, slots=True)
class Layer(Generic[Norm]):
    attention_norm: Norm  # [hidden]
    qkv: Form  # hidden -> (heads + 2 kv_heads) * head_dim
    qkv_bias: Tensor | None
    qk_norm: Norm | None  # [heads + kv_heads, head_dim]
    out: Form  # heads * head_dim -> hidden
    mlp_norm: Norm
    gate_up: Form  # hidden -> 2 * intermediate, or the activation of these as well: -> intermediate
    down: Form  # intermediate -> hidden


@dataclass(frozen=True, slots=True)
class Parameters(Generic[Norm]):
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer[Norm], ...]
    norm: Norm
    head: Form  # hidden -> vocab
    frequencies: Tensor  # [head_dim / 2], radians per position


@dataclass(frozen=True, slots=True)
class Makers(Generic[Norm]):
    """What a backend makes of matrices and of norms' weights; `dtype` is the embedding's.

    `qkv` and `gate_up` are given the weight of the norm before them, too: by its columns it may as well be in the matrix.
    """

    qkv: NormedMaker
    gate_up: NormedMaker
    adding: Maker  # of layers whose answer is added to the residual
    head: Maker
    norm: Callable[[Tensor, float], Norm]
    dtype: torch.dtype


class Source(Protocol):
    """Where parameters come from."""

    def has(self, name: str) -> bool: ...

    def matrix(self, name: str, *shape: int) -> Matrix: ...

    def vector(self, name: str, size: int) -> Tensor:
        """In float32."""
        ...


class Taker:
    """Hands out a checkpoint's tensors, checked by shape, and knows what was left over. Raises BadModel."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.left = dict(checkpoint.tensors)

    def has(self, name: str) -> bool:
        return name in self.left

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


class Random:
    """Random parameters of any shape, straight on a device: for measuring a model that nobody has here."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def has(self, name: str) -> bool:
        return name != "rope_factors"

    def matrix(self, name: str, *shape: int) -> Tensor:
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.normal_(0, 0.02, generator=self.generator)

    def vector(self, name: str, size: int) -> Tensor:
        return torch.ones(size, device=self.device)


def load(checkpoint: Checkpoint, makers: Makers[Norm]) -> Parameters[Norm]:
    """Read all parameters of a checkpoint. Raises BadModel."""
    taker = Taker(checkpoint)
    parameters = build(checkpoint.spec, taker, makers, paired=checkpoint.paired)
    taker.finish(checkpoint.spec)
    return parameters


def build(spec: ModelSpec, take: Source, makers: Makers[Norm], *, paired: bool) -> Parameters[Norm]:
    embedding = dense(take.matrix("model.embed_tokens.weight", spec.vocab_size, spec.hidden))
    head = embedding if spec.tied else take.matrix("lm_head.weight", spec.vocab_size, spec.hidden)
    frequencies = torch.tensor(spec.frequencies, dtype=torch.float32, device=embedding.device)
    if take.has("rope_factors"):
        frequencies = frequencies / take.vector("rope_factors", spec.head_dim // 2)
    layers = tuple(_layer(take, spec, makers, index, paired=paired) for index in range(spec.layers))
    norm = makers.norm(take.vector("model.norm.weight", spec.hidden), spec.rms_eps)
    return Parameters(embedding.to(makers.dtype), layers, norm, makers.head(head), frequencies)


def _layer(take: Source, spec: ModelSpec, makers: Makers[Norm], index: int, *, paired: bool) -> Layer[Norm]:
    norm = makers.norm
    at, hidden, wide = f"model.layers.{index}.", spec.hidden, spec.intermediate
    order = torch.arange(spec.head_dim) if paired else _pairs(spec.head_dim)
    before_qkv, before_mlp = (take.vector(f"{at}{n}_layernorm.weight", hidden) for n in ("input", "post_attention"))
    return Layer(
        attention_norm=norm(before_qkv, spec.rms_eps),
        qkv=makers.qkv(_qkv(take, spec, at, order), before_qkv),
        qkv_bias=_bias(take, spec, at, order) if spec.qkv_bias else None,
        qk_norm=norm(_qk_norm(take, spec, at, order), spec.rms_eps) if spec.qk_norm else None,
        out=makers.adding(take.matrix(at + "self_attn.o_proj.weight", hidden, spec.heads * spec.head_dim)),
        mlp_norm=norm(before_mlp, spec.rms_eps),
        gate_up=makers.gate_up(
            stack([take.matrix(f"{at}mlp.{n}_proj.weight", wide, hidden) for n in ("gate", "up")]), before_mlp
        ),
        down=makers.adding(take.matrix(at + "mlp.down_proj.weight", hidden, wide)),
    )


def _pairs(head_dim: int) -> Tensor:
    """The order that puts dimension i and i + head_dim / 2, which hubs rotate together, side by side."""
    return torch.arange(head_dim).view(2, -1).t().flatten()


def _every_head(order: Tensor, heads: int) -> Tensor:
    return (torch.arange(heads).unsqueeze(1) * order.numel() + order).flatten()


def _qkv(take: Source, spec: ModelSpec, at: str, order: Tensor) -> Matrix:
    """Rows of q and k reordered, which leaves their products, and the columns of each 4-bit group, as they are."""
    parts: list[Matrix] = []
    for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
        part = take.matrix(f"{at}self_attn.{name}_proj.weight", heads * spec.head_dim, spec.hidden)
        rows = _every_head(order, heads)
        parts.append(part if name == "v" else part.rows(rows) if isinstance(part, Grouped) else part[rows])
    return stack(parts)


def _qk_norm(take: Source, spec: ModelSpec, at: str, order: Tensor) -> Tensor:
    """[heads + kv_heads, head_dim]"""
    q, k = (take.vector(f"{at}self_attn.{name}_norm.weight", spec.head_dim)[order] for name in "qk")
    return torch.cat((q.expand(spec.heads, -1), k.expand(spec.kv_heads, -1)))


def _bias(take: Source, spec: ModelSpec, at: str, order: Tensor) -> Tensor:
    q, k, v = (
        take.vector(f"{at}self_attn.{name}_proj.bias", heads * spec.head_dim)
        for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
    )
    return torch.cat((q[_every_head(order, spec.heads)], k[_every_head(order, spec.kv_heads)], v))
