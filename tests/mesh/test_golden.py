"""Greedy output through the HTTP API equals the reference, token by token; alone, together, chunked and cached."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.mesh.harness import RunningMesh

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text())
TIE = 0.02  # where the reference's two best logits are closer than this, either may come


async def answer(mesh: RunningMesh, golden: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"messages": golden["messages"], "max_tokens": len(golden["output_ids"]), "temperature": 0, "return_token_ids": True}
    status, reply = await mesh.post("/v1/chat/completions", body | more)
    assert status == 200, reply
    return dict(reply)


def check(golden: dict[str, Any], ids: list[int]) -> None:
    """Equal, or equal up to a near tie (after which the texts are different ones)."""
    pairs = enumerate(zip(ids, golden["output_ids"], strict=False))
    different = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
    if different is None:
        assert len(ids) == len(golden["output_ids"])
    else:
        assert golden["margins"][different] < TIE, f"token {different} differs"


@pytest.mark.parametrize("golden", GOLDEN[::3], ids=lambda golden: golden["messages"][-1]["content"][:24])
async def test_alone(mesh: RunningMesh, golden: dict[str, Any]) -> None:
    reply = await answer(mesh, golden)
    check(golden, reply["choices"][0]["token_ids"])
    assert reply["usage"]["prompt_tokens"] == len(golden["prompt_ids"])


async def test_together(mesh: RunningMesh) -> None:
    """All at once, some twice over: continuous batching, chunks and prefix hits change nothing."""
    asked = GOLDEN + GOLDEN[::4]
    replies = await asyncio.gather(*(answer(mesh, golden) for golden in asked))
    for golden, reply in zip(asked, replies, strict=True):
        check(golden, reply["choices"][0]["token_ids"])
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    assert max(cached) >= 16, "no prefix was found computed"


async def test_preempted() -> None:
    """Pages for three requests, eight at once: the youngest are thrown out again and again, and nothing changes."""
    env = {"HEADRACE_DTYPE": "float32", "HEADRACE_MAX_CONTEXT": "128", "HEADRACE_ENGINE_KV_TOKENS": "320"}
    async with RunningMesh(env=env | {"HEADRACE_ENGINE_MAX_RUNNING": "16"}) as cramped:
        replies = await asyncio.gather(*(answer(cramped, golden) for golden in GOLDEN[:8]))
        for golden, reply in zip(GOLDEN[:8], replies, strict=True):
            check(golden, reply["choices"][0]["token_ids"])
        await cramped.drained()
        [engine] = [beat for beat in await cramped.bus.members() if beat.stage == "engine"]
        assert engine.counters["preemptions"] > 0


async def test_choices(mesh: RunningMesh) -> None:
    """n > 1 shares pages by copy on write; greedy choices are all the same."""
    golden = max(GOLDEN, key=lambda record: len(record["prompt_ids"]))
    reply = await answer(mesh, golden, n=3)
    for choice in reply["choices"]:
        check(golden, choice["token_ids"])


async def test_seeds(mesh: RunningMesh) -> None:
    """A seed gives its text again, whoever runs beside it; choices and seeds differ."""
    body = {"messages": GOLDEN[0]["messages"], "max_tokens": 12, "temperature": 1.5, "n": 2, "seed": 7}

    async def texts(**more: Any) -> list[str]:
        _, reply = await mesh.post("/v1/chat/completions", body | more)
        return [choice["message"]["content"] for choice in reply["choices"]]

    first = await texts()
    again, other, *_ = await asyncio.gather(texts(), texts(seed=8), *(answer(mesh, golden) for golden in GOLDEN[:3]))
    assert first == again
    assert first[0] != first[1]
    assert first != other
