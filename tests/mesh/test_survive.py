"""What a killed engine had begun goes on as if nothing had happened, with the real model and whatever a request may ask for."""

import asyncio
from typing import Any

from tests.mesh.harness import RunningMesh

ASK = {"prompt": "The history of the windmill begins", "max_tokens": 16, "return_token_ids": True}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy, with logprobs": {"temperature": 0, "logprobs": 2},
    "seeded choices": {"temperature": 1.2, "top_p": 0.9, "seed": 11, "n": 2},
    "penalties": {"temperature": 0.8, "seed": 5, "presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    "least tokens": {"temperature": 1.5, "seed": 3, "min_tokens": 16},
}


TOWN = {
    "name": "mills",
    "modules": [{"name": "wind", "text": "Wind turns the sails. "}, {"name": "water", "text": "Water turns the wheel. "}],
}
MODULES = {"temperature": 0, "n": 2, "prompt_schema": {"name": "mills", "modules": ["wind", "water"]}}


async def answers(mesh: RunningMesh, requests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    async def one(more: dict[str, Any]) -> Any:
        status, reply = await mesh.post("/v1/completions", ASK | more)
        assert status == 200, reply
        return reply["choices"], reply["usage"]["completion_tokens"]

    return dict(zip(requests, await asyncio.gather(*map(one, requests.values())), strict=True))


def same(told: Any, before: Any) -> bool:
    """Equal, with logprobs as exact as sums in another order are."""
    if isinstance(told, dict):
        return told.keys() == before.keys() and all(same(value, before[name]) for name, value in told.items())
    if isinstance(told, list | tuple):
        return len(told) == len(before) and all(map(same, told, before))
    return abs(told - before) < 0.01 if isinstance(told, float) else bool(told == before)


async def has_told(mesh: RunningMesh, entries: int) -> None:
    """Wait until the token log has grown by so much."""
    [keys] = await mesh.bus.run([("KEYS", mesh.bus.names.tokens("*"))])
    streams = [key.decode() for key in keys]
    before = sum(await mesh.bus.depths(streams))
    while True:
        if sum(await mesh.bus.depths(streams)) >= before + entries:
            return
        await asyncio.sleep(0.01)


async def test_an_engine_dies_and_nothing_shows(mesh: RunningMesh) -> None:
    assert (await mesh.post("/v1/prompt_schemas", TOWN))[0] == 201
    undisturbed = await answers(mesh, REQUESTS | {"modules computed apart": MODULES})
    text = undisturbed["greedy, with logprobs"][0][0]["text"]
    requests = REQUESTS | {"modules computed apart": MODULES, "stop string": {"temperature": 0, "stop": text[-12:-6]}}
    again = asyncio.create_task(answers(mesh, requests))
    await has_told(mesh, entries=6)
    assert not again.done()
    old = mesh.kill("engine-0")
    disturbed = await again
    for name, told in undisturbed.items():
        assert same(disturbed[name], told), (name, disturbed[name], told)
    [stopped] = disturbed["stop string"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index(text[-12:-6])]
    await mesh.until_ready()
    [engine] = [beat for beat in await mesh.bus.members() if beat.stage == "engine"]
    assert engine.pid != old
    assert engine.counters["takeovers"] > 0
    assert engine.counters["replayed_tokens"] > 0
