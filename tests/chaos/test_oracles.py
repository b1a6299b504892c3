"""The oracles see what is planted: a streamer that leaks what it holds and what it was told, and no other."""

import asyncio
import random
import re

from services.up.supervise import Child
from tests.chaos.__main__ import once
from tests.chaos.field import Field
from tests.chaos.matrix import Row
from tests.chaos.oracles import TENANTS_ENV
from tests.mesh.harness import RunningMesh


class LeakyMesh(RunningMesh):
    def _keep(self, child: Child) -> Child:
        if child.name == "streamer-0":
            child.command[-1] = "tests.chaos.leaky"
        return super()._keep(child)


async def quiet(_: Field) -> None:
    await asyncio.sleep(2)


ROW = Row("-", "nothing", "", quiet, seconds=2)


async def wrong(mesh: RunningMesh) -> list[str]:
    async with mesh:
        ground, found = await once(ROW, random.randrange(1000), mesh, None)
    assert ground.tally.requests + len(ground.tally.failures) >= 16
    return [*ground.tally.failures, *found]


async def test_a_leak_of_everything_is_seen() -> None:
    found = await wrong(LeakyMesh({}, chain=True, env=TENANTS_ENV | {"HEADRACE_LOG": "info"}, log=True))
    for what in (
        "streamer-0 holds .* files", "streamer-0 holds .* tasks", "streamer-0 holds .* memory",
        "the log says SECRET_", "/metrics says SECRET_", "alice was told .*SECRET_bob", "bob was told .*SECRET_alice",
    ):  # fmt: skip
        assert any(re.search(what, text) for text in found), (what, found)


async def test_where_nothing_leaks_nothing_is_seen() -> None:
    assert not await wrong(RunningMesh({}, chain=True, env=TENANTS_ENV | {"HEADRACE_LOG": "info"}, log=True))
