"""The GPU's device on small random models: compiled where there is a GPU, else in Triton's interpreter."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # to be chosen before triton is imported

if TYPE_CHECKING:
    from services.engine.gpu.device import Gpu

Opener = Callable[..., "Gpu"]


@pytest.fixture
def open_gpu() -> Opener:
    """Serves a checkpoint: in float32 in the interpreter, else in bfloat16."""
    from services.engine.gpu.build import open_device
    from services.engine.plan import Limits
    from shared.config import EngineConfig

    def opened(path: Path, block_size: int = 8, blocks: int = 64, deterministic: bool = False) -> "Gpu":
        config = EngineConfig(
            id="test", model=str(path), block_size=block_size, kv_tokens=(blocks - 1) * block_size,
            dtype="bfloat16" if torch.cuda.is_available() else "float32", deterministic=deterministic,
        )  # fmt: skip
        limits = Limits(max_running=8, token_budget=32, prefill_budget=32)
        return open_device(config, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), limits)

    return opened
