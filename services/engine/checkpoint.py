"""Opens a checkpoint, GGUF file or hub directory: its spec, and its tensors under the hub's names, read when asked."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.gguf_reader import ReaderTensor
from safetensors import SafetensorError, safe_open

from services.engine.gguf_file import open_gguf
from services.engine.matrix import GROUP, Grouped, Matrix
from services.engine.spec import BadModel, ModelSpec, from_config

# Hub name (inside its layer, where it has one) to GGUF name.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "rope_factors": "rope_freqs.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
HUB = {gguf: hub for hub, gguf in NAMES.items()}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors` maps a hub name to what reads it.

    `paired`: rotary pairs lie side by side in q and k, not half a head apart. `quantized`: a tensor has under 16 bits.
    """

    spec: ModelSpec
    tensors: dict[str, Callable[[], Matrix]]
    paired: bool
    quantized: bool


def open_checkpoint(path: Path, device: str = "cpu") -> Checkpoint:
    """Tensors are read straight to `device`. Raises BadModel when no readable model of a served architecture is at `path`."""
    if not path.exists():
        raise BadModel(f"there is no model at {path}; give a GGUF file or a directory with config.json and safetensors")
    return _open_directory(path, device) if path.is_dir() else _open_gguf(path, device)


def _open_gguf(path: Path, device: str) -> Checkpoint:
    spec, tensors = open_gguf(path)
    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    return Checkpoint(
        spec,
        {_hub_name(name): partial(_read_gguf, tensor, device) for name, tensor in tensors.items()},
        paired=spec.architecture == "llama",  # llama.cpp's converter pairs the rows of this architecture only
        quantized=any(tensor.tensor_type not in plain for tensor in tensors.values()),
    )


def _hub_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`; one without a counterpart stays."""
    if not name.startswith("blk."):
        return HUB.get(name, name)
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{HUB.get(rest, rest)}"


def _read_gguf(tensor: ReaderTensor, device: str) -> Matrix:
    kind, data = tensor.tensor_type, tensor.data
    if kind in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1):
        return _read_4bit(torch.from_numpy(np.array(data)).to(device), has_floor=kind == GGMLQuantizationType.Q4_1)
    if kind == GGMLQuantizationType.Q8_0:
        return _read_8bit(torch.from_numpy(np.array(data)).to(device))
    try:
        return torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32)).to(device)
    except NotImplementedError:
        raise BadModel(f"GGUF type {kind.name} is not served; choose Q4_1, Q4_0, Q8_0, F16, BF16 or F32") from None


def _read_4bit(raw: torch.Tensor, *, has_floor: bool) -> Grouped:
    """Per group of 32: scale (f16), in Q4_1 floor (f16), then 16 bytes whose low nibbles come first. Source: ggml."""
    blocks = raw.view(raw.shape[0], -1, 20 if has_floor else 18)  # [rows, groups, bytes]
    scale = blocks[..., :2].contiguous().view(torch.float16).float().squeeze(-1)
    floor = blocks[..., 2:4].contiguous().view(torch.float16).float().squeeze(-1) if has_floor else scale * -8
    nibbles = blocks[..., -GROUP // 2 :]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)  # [rows, groups, 32]
    return Grouped(codes.view(raw.shape[0], -1), scale, floor)


def _read_8bit(raw: torch.Tensor) -> torch.Tensor:
    """Per group of 32: scale (f16), then 32 signed bytes."""
    blocks = raw.view(raw.shape[0], -1, 2 + GROUP)
    scale = blocks[..., :2].contiguous().view(torch.float16)
    return (blocks[..., 2:].view(torch.int8) * scale.float()).view(raw.shape[0], -1)


def _open_directory(path: Path, device: str) -> Checkpoint:
    spec = from_config(_json(path / "config.json"))
    files = {path / name for name in _shards(path)}
    tensors: dict[str, Callable[[], Matrix]] = {}
    for file in sorted(files):
        tensors.update(_open_safetensors(file, device))
    return Checkpoint(spec, tensors, paired=False, quantized=False)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadModel(f"{path} cannot be read ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise BadModel(f"{path} does not hold a JSON object; download the model again")
    return value


def _shards(path: Path) -> set[str]:
    if (path / "model.safetensors").exists():
        return {"model.safetensors"}
    index = _json(path / "model.safetensors.index.json").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(n, str) and "/" not in n for n in index.values()):
        raise BadModel(f"{path / 'model.safetensors.index.json'} has no weight_map; download the model again")
    return set(index.values())


def _open_safetensors(file: Path, device: str) -> dict[str, Callable[[], Matrix]]:
    try:
        opened = safe_open(file, framework="pt", device=device)
    except (OSError, SafetensorError) as error:
        raise BadModel(f"{file} is not a whole safetensors file ({error}); download it again") from None
    names: list[str] = list(opened.keys())
    return {name: partial(opened.get_tensor, name) for name in names}
