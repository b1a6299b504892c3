"""Which GPU an engine gets, and how much of its memory, when several engines share a machine."""

import os
from collections.abc import Mapping
from pathlib import Path

SHARE = 0.9  # of a GPU's memory, for all engines on it


def count_gpus() -> int:
    """NVIDIA's device files, since the supervisor has no torch."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def settings(engine: int, engines: int, gpus: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Engines take turns on the GPUs. What the environment says already is left as it is."""
    if not gpus:
        return {}
    beside = (engines - engine % gpus + gpus - 1) // gpus  # engines on the same GPU, this one included
    chosen = {"HEADRACE_ENGINE_DEVICE": f"cuda:{engine % gpus}", "HEADRACE_ENGINE_GPU_SHARE": f"{SHARE / beside:.3f}"}
    return {name: value for name, value in chosen.items() if name not in environ}
