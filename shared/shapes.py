"""Named model shapes, as hubs' config.json files have them: an engine serves one with random weights, to be measured. Pure."""

from typing import Any

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(architecture: str, sizes: tuple[int, int, int, int, int, int, int], **others: Any) -> dict[str, Any]:
    vocab, hidden, intermediate, layers, heads, kv_heads, positions = sizes
    return {
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
    } | others


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape(
        "LlamaForCausalLM", (49152, 576, 1536, 30, 9, 3, 8192), rope_theta=100000.0, tie_word_embeddings=True
    ),
    "llama-3.2-1b": _shape(
        "LlamaForCausalLM", (128256, 2048, 8192, 16, 32, 8, 131072),
        rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _shape(
        "LlamaForCausalLM", (128256, 4096, 14336, 32, 32, 8, 131072), rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE
    ),
    "qwen3-8b": _shape(
        "Qwen3ForCausalLM", (151936, 4096, 12288, 36, 32, 8, 40960), rope_theta=1000000.0, head_dim=128, rms_norm_eps=1e-6
    ),
}  # fmt: skip


def context_of(shape: str) -> int:
    return int(SHAPES[shape]["max_position_embeddings"])
