"""Meshes that tests share: one with the real model at float32, one of two processes per stage with the chain engine."""

from collections.abc import AsyncIterator

import pytest

from tests.mesh.harness import RunningMesh


@pytest.fixture(scope="session")
async def mesh() -> AsyncIterator[RunningMesh]:
    """SmolLM2 at float32, where neither batch nor prefix hits change a token; two streamers."""
    env = {"HEADRACE_DTYPE": "float32", "HEADRACE_ENGINE_MAX_RUNNING": "16", "HEADRACE_ENGINE_TOKEN_BUDGET": "256"}
    async with RunningMesh({"streamer": 2}, env=env) as running:
        yield running


@pytest.fixture(scope="session")
async def chain_mesh() -> AsyncIterator[RunningMesh]:
    """Two of each stage; every token a function of its whole context. Steps take 4 ms, so there is time to interfere."""
    async with RunningMesh({"tokenizer": 2, "engine": 2, "streamer": 2}, chain=True, env={"CHAIN_STEP_S": "0.004"}) as running:
        yield running
