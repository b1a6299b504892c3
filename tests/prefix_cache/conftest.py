"""One prefix cache for the tests that speak to it as engines do, empty at the start of each."""

from collections.abc import AsyncIterator

import pytest

from tests.prefix_cache.meshes import CacheMesh


@pytest.fixture(scope="session")
async def running_cache() -> AsyncIterator[CacheMesh]:
    async with CacheMesh(lease_s=1.0) as running:
        yield running


@pytest.fixture
def cache(running_cache: CacheMesh) -> CacheMesh:
    running_cache.empty()
    return running_cache
