"""A model that cannot be served is refused with one sentence that says what is wrong and what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.forward import Forward
from services.engine.spec import BadModel
from tests.engine.conftest import Writer
from tests.engine.reference import make_config, make_tensors

CONFIG = make_config("LlamaForCausalLM")
TENSORS = make_tensors(CONFIG)


def refused(path: Path, match: str) -> None:
    with pytest.raises(BadModel, match=match) as caught:
        Forward(path, "float32", 4, 16)
    assert "\n" not in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "there is no model at")
    refused(tmp_path, "config.json cannot be read")


@pytest.mark.parametrize("keep", [0, 3, 20, 5000, 1_900_000, 50_000_000])
def test_broken_gguf(keep: int, smollm2_path: Path, tmp_path: Path) -> None:
    with smollm2_path.open("rb") as whole:
        (tmp_path / "m.gguf").write_bytes(whole.read(keep))
    refused(tmp_path / "m.gguf", "not a whole GGUF file|cannot mmap|lacks")


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"hello, world" * 100)
    refused(tmp_path / "m.gguf", "GGUF magic invalid")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "is not served"),
        ({"architectures": 5}, "is not served"),
        ({"num_attention_heads": None}, "lacks or garbles"),
        ({"num_key_value_heads": 3}, "inconsistent"),
        ({"num_hidden_layers": -1}, "not positive"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks or garbles"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 128}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown tensors"),
    ],
)
def test_config(changes: dict[str, Any], match: str, hub: Writer) -> None:
    refused(hub(CONFIG | changes, TENSORS), match)


def test_tensors(hub: Writer) -> None:
    few: dict[str, Tensor] = {name: t for name, t in TENSORS.items() if "layers.1.mlp.up" not in name}
    refused(hub(CONFIG, few), "lacks the tensor model.layers.1.mlp.up_proj.weight")
    refused(hub(CONFIG, TENSORS | {"extra.weight": torch.zeros(2)}), "extra.weight")


def test_broken_safetensors(hub: Writer) -> None:
    path = hub(CONFIG, TENSORS)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:900])
    refused(path, "not a whole safetensors file")
    (path / "model.safetensors").unlink()
    refused(path, "model.safetensors.index.json cannot be read")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    refused(path, "no weight_map")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(path, "gone.safetensors")
