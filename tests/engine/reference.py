"""An independent, plain Llama forward over one whole sequence, in float64, by hub names and rotary layout."""

import math
from typing import Any

import torch
from torch import Tensor


def make_config(architecture: str, **changes: Any) -> dict[str, Any]:
    config = {
        "architectures": [architecture],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
    }
    return config | changes


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors under hub names; biases and q/k norms where the architecture has them."""
    random = torch.Generator().manual_seed(seed)
    kind, hidden, size = config["architectures"][0], config["hidden_size"], config["head_dim"]
    q, kv, wide = (
        config["num_attention_heads"] * size,
        config["num_key_value_heads"] * size,
        config["intermediate_size"],
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, columns)
            if kind.startswith("Qwen2") and name != "o":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        for name, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
            shapes[f"{at}mlp.{name}_proj.weight"] = (rows, columns)
        for name in ("input", "post_attention"):
            shapes[f"{at}{name}_layernorm.weight"] = (hidden,)
        for name in "qk" if kind.startswith("Qwen3") else "":
            shapes[f"{at}self_attn.{name}_norm.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    made = {name: torch.randn(shape, generator=random) * 0.15 for name, shape in shapes.items()}
    return {name: 1 + 3 * t if "norm" in name else t for name, t in made.items()}


def logits(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    ids: list[int],
    positions: list[int] | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """[tokens, vocab] float64. `hidden` [tokens, tokens]: which others a token does not see; not given, those behind it."""
    if hidden is None:
        hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
    where = torch.arange(len(ids)) if positions is None else torch.tensor(positions)
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w["model.embed_tokens.weight"][ids]
    angles = where.double().unsqueeze(1) * _frequencies(config)
    cos, sin = (torch.cat((f(angles), f(angles)), -1).unsqueeze(1) for f in (torch.cos, torch.sin))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        x = x + _attend(config, w, at, _norm(x, w[at + "input_layernorm.weight"]), cos, sin, hidden)
        y = _norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{at}mlp.{n}_proj.weight"].t() for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[at + "mlp.down_proj.weight"].t()
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return _norm(x, w["model.norm.weight"]) @ head.t()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def _frequencies(config: dict[str, Any]) -> Tensor:
    plain = config["rope_theta"] ** (-torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"])
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"]
    length, low, high = (scaling[f"{n}"] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    waves = 2 * math.pi / plain
    smooth = (length / waves - low) / (high - low)
    mixed = (1 - smooth) * plain / scaling["factor"] + smooth * plain
    slow = torch.where(waves > length / low, plain / scaling["factor"], mixed)
    return torch.where(waves < length / high, plain, slow)


def _attend(
    config: dict[str, Any], w: dict[str, Tensor], at: str, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor
) -> Tensor:
    parts = []
    for name in "qkv":
        y = x @ w[f"{at}self_attn.{name}_proj.weight"].t() + w.get(f"{at}self_attn.{name}_proj.bias", 0)
        y = y.view(len(x), -1, config["head_dim"])
        if f"{at}self_attn.{name}_norm.weight" in w:
            y = _norm(y, w[f"{at}self_attn.{name}_norm.weight"])
        half = config["head_dim"] // 2
        turned = torch.cat((-y[..., half:], y[..., :half]), -1)
        parts.append(y if name == "v" else y * cos + turned * sin)
    q, k, v = parts
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(config["head_dim"])
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ w[at + "self_attn.o_proj.weight"].t()
