"""Who may share what: a tenant's pages are its own, but for the beginnings that the operator has declared public.

There are no keys at the door yet, so requests are submitted as a streamer submits them, with a tenant each.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from statistics import median

import pytest

from shared.layout import Layout
from shared.messages import End, Sampling, Submit
from tests.prefix_cache.meshes import EngineMesh

SYSTEM = " ".join(f"Rule {at}: answer with the name of the lock and the level of the water there." for at in range(40))
PAIRS = 4
_fresh = count(1)


async def found(mesh: EngineMesh, tenant: str, prompt: str, layout: Layout | None = None) -> tuple[int, float]:
    """Submit a request; how many tokens of its prompt were found computed, and the time to compute the others."""
    name = f"test-{next(_fresh)}"
    submit = Submit(
        request=name, tenant=tenant, partition=name, log_from="0-0", generation=0, given=(), ends=(), prompt=prompt,
        sampling=Sampling(ignore_eos=True), max_tokens=2, deadline_ms=int(1000 * (time.time() + 60)),
        layout=layout,
    )  # fmt: skip
    await mesh.bus.append(mesh.bus.names.submit, submit)
    async with asyncio.timeout(30):
        while True:
            log, _ = await mesh.bus.told(mesh.bus.names.tokens(name), name, "0-0")
            for _, record in log:
                if isinstance(record, End):
                    return record.cached_tokens, record.prefill_ms
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's file of public prompts."""
    file = tmp_path_factory.mktemp("public") / "prefixes.json"
    file.write_text(json.dumps([SYSTEM]))
    return file


@pytest.fixture(scope="module")
async def mesh(declared: Path) -> AsyncIterator[EngineMesh]:
    async with EngineMesh(1, env={"HEADRACE_TOKENIZER_PUBLIC_PREFIXES": str(declared)}) as running:
        yield running


async def settled(mesh: EngineMesh) -> None:
    """What was computed is stored, and no engine remembers it."""
    await asyncio.sleep(0.5)
    await mesh.forget()


async def test_paired(mesh: EngineMesh) -> None:
    """The same prompt from its tenant and from another, in turn: the other finds nothing, and waits as for a new prompt."""
    prompts = [f"The {at}th of private prompts. {SYSTEM}" for at in range(PAIRS)]
    for prompt in prompts:
        await found(mesh, "alice", prompt)
    await settled(mesh)
    other = [await found(mesh, "bob", prompt) for prompt in prompts]
    same = [await found(mesh, "alice", prompt) for prompt in prompts]
    assert [tokens for tokens, _ in other] == [0] * PAIRS
    assert all(tokens > 400 for tokens, _ in same)
    assert median(ms for _, ms in other) > 2 * median(ms for _, ms in same), "five steps of 20 ms each, against one"


async def test_public(mesh: EngineMesh) -> None:
    """Bob finds what the operator declared public, however much of Alice's question is the same as his."""
    question = SYSTEM + " How high does the water stand at the third lock, and who will open it for us this morning?" * 3
    await found(mesh, "alice", question)
    await settled(mesh)
    shared, _ = await found(mesh, "bob", question)
    own, _ = await found(mesh, "alice", question)
    assert 400 < shared < own
