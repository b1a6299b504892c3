"""What a model is: its sizes and its rotary frequencies, read from a hub's config.json or from GGUF metadata. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HUB_NAMES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
GGUF_NAMES = ("llama", "qwen2", "qwen3")


class BadModel(ValueError):
    """A model that cannot be served. The text is one sentence for the person who chose it."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones, with a ramp between the two limits."""

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def apply(self, frequency: float) -> float:
        """Source: Llama 3.1's reference code, as in transformers' `_compute_llama3_parameters`."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.original * frequency / (2 * math.pi)  # full turns within the original context
        ramp = min(1.0, max(0.0, (turns - self.low) / (self.high - self.low)))
        return frequency * (ramp + (1 - ramp) / self.factor)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes are in elements, `max_positions` in tokens."""

    architecture: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads, self.head_dim)
        if min(*sizes, self.max_positions) <= 0 or self.rope_theta <= 0:
            raise BadModel("the model's configuration has a size that is not positive; download the model again")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise BadModel(
                f"the model's configuration is inconsistent ({self.heads} heads, {self.kv_heads} key/value heads, "
                f"head size {self.head_dim}); download the model again"
            )

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Radians per position of each of the head_dim / 2 rotated pairs."""
        plain = (self.rope_theta ** (-2 * pair / self.head_dim) for pair in range(self.head_dim // 2))
        return tuple(self.rope_scaling.apply(f) if self.rope_scaling else f for f in plain)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec in a hub's config.json. Raises BadModel for what this engine does not serve."""
    named = config.get("architectures")
    named = named[0] if isinstance(named, list) and named else named
    if not isinstance(named, str) or named not in HUB_NAMES:
        raise BadModel(f"architecture {named!r} is not served; choose one of {', '.join(HUB_NAMES)}")
    _refuse_unserved(config)
    try:
        return _hub_spec(HUB_NAMES[named], config)
    except (KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, BadModel) else _unreadable("config.json", error) from None


def _unreadable(place: str, error: Exception) -> BadModel:
    return BadModel(f"{place} lacks or garbles a value ({error}); download the model again")


def _refuse_unserved(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise BadModel(f"activation {config['hidden_act']!r} is not served; choose a model with silu")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(key):
            raise BadModel(f"config.json sets {key}, which is not served; choose a model without it")


def _hub_spec(architecture: str, config: Mapping[str, Any]) -> ModelSpec:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    rope = config.get("rope_parameters") or {}
    return ModelSpec(
        architecture=architecture,
        vocab_size=int(config["vocab_size"]),
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_hub_scaling(rope or config.get("rope_scaling") or {}),
        rms_eps=float(config["rms_norm_eps"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_positions=_positions(config),
    )


def _positions(config: Mapping[str, Any]) -> int:
    """Within its window, sliding attention is full attention: such a model is served up to the window's length."""
    positions, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    return min(positions, int(window)) if window and config.get("use_sliding_window", True) else positions


def _hub_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return RopeScaling("llama3", float(rope["factor"]), low, high, int(rope["original_max_position_embeddings"]))
    raise BadModel(f"rope scaling {kind!r} is not served; choose a model with none, linear or llama3")


def from_gguf(fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The spec in a GGUF file's metadata and its tensors' shapes (rows first). Raises BadModel."""
    architecture = fields.get("general.architecture")
    if architecture not in GGUF_NAMES:
        raise BadModel(f"GGUF architecture {architecture!r} is not served; choose one of {', '.join(GGUF_NAMES)}")
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    try:
        return _gguf_spec(str(architecture), own, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, BadModel) else _unreadable("the GGUF file", error) from None


def _gguf_spec(architecture: str, own: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    heads, hidden = int(own["attention.head_count"]), int(own["embedding_length"])
    return ModelSpec(
        architecture=architecture,
        vocab_size=tensors["token_embd.weight"][0],
        hidden=hidden,
        intermediate=int(own["feed_forward_length"]),
        layers=int(own["block_count"]),
        heads=heads,
        kv_heads=int(own.get("attention.head_count_kv", heads)),
        head_dim=int(own.get("attention.key_length", hidden // heads)),
        rope_theta=float(own.get("rope.freq_base", 10000.0)),
        rope_scaling=_gguf_scaling(own),
        rms_eps=float(own["attention.layer_norm_rms_epsilon"]),
        tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        max_positions=int(own["context_length"]),
    )


def _gguf_scaling(own: Mapping[str, Any]) -> RopeScaling | None:
    """GGUF states linear scaling; Llama 3's lies in the tensor `rope_freqs.weight` instead."""
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(own["rope.scaling.factor"]))
    raise BadModel(f"rope scaling {kind!r} is not served; choose a model with none, linear or llama3")
