"""Engines take turns on the GPUs of a machine, and share the memory of one."""

from hypothesis import given
from hypothesis import strategies as st

from services.up.gpus import SHARE, settings


@given(st.integers(1, 12), st.integers(1, 8))
def test_no_gpu_is_given_away_twice(engines: int, gpus: int) -> None:
    shares: dict[str, float] = {}
    for engine in range(engines):
        chosen = settings(engine, engines, gpus, {})
        device = chosen["HEADRACE_ENGINE_DEVICE"]
        shares[device] = shares.get(device, 0.0) + float(chosen["HEADRACE_ENGINE_GPU_SHARE"])
    assert len(shares) == min(engines, gpus)
    assert all(abs(share - SHARE) < 0.01 for share in shares.values())


def test_what_is_said_already_stands() -> None:
    assert settings(1, 2, 2, {"HEADRACE_ENGINE_DEVICE": "cpu"}) == {"HEADRACE_ENGINE_GPU_SHARE": "0.900"}
    assert settings(0, 1, 0, {}) == {}
