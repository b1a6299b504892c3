"""The `openai` client against the real mesh, as a user would use it."""

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.mesh.harness import RunningMesh

QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
async def client(mesh: RunningMesh) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_models(client: AsyncOpenAI) -> None:
    models = [model.id async for model in client.models.list()]
    assert models == ["SmolLM2-135M-Instruct"]
    assert (await client.models.retrieve(models[0])).id == models[0]


async def test_chat(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="default", messages=[QUESTION], temperature=0, max_tokens=40)
    assert reply.choices[0].message.content == "The capital of France is Paris."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8


async def test_chat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="SmolLM2-135M-Instruct", messages=[QUESTION], temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces, reasons, usage = [], [], None
    async for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    assert "".join(pieces) == "The capital of France is Paris."
    assert len([piece for piece in pieces if piece]) > 3
    assert reasons == ["stop"]
    assert usage is not None
    assert usage.completion_tokens == 8


async def test_stop_strings_never_leak(client: AsyncOpenAI) -> None:
    """The stop string spans tokens; with n > 1 each choice ends for itself."""
    reply = await client.chat.completions.create(
        model="default", messages=[QUESTION], temperature=0, stop=["France is P"], n=2, max_tokens=30
    )
    assert [choice.message.content for choice in reply.choices] == ["The capital of "] * 2
    assert [choice.finish_reason for choice in reply.choices] == ["stop"] * 2


async def test_logprobs(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="default", messages=[QUESTION], temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    told = reply.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(token.token for token in told.content) == reply.choices[0].message.content
    for token in told.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy takes the most likely"
        assert token.top_logprobs[0].logprob == max(top.logprob for top in token.top_logprobs)


async def test_completion(client: AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model="default", prompt="The capital of France is", temperature=0, max_tokens=5, logprobs=2
    )
    assert "Paris" in reply.choices[0].text
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.token_logprobs or []) == 5


async def test_logit_bias_and_penalties(client: AsyncOpenAI) -> None:
    """A ban is kept, and a strong repetition penalty ends loops."""
    paris = 7042
    reply = await client.chat.completions.create(
        model="default", messages=[QUESTION], temperature=0, max_tokens=10, logit_bias={str(paris): -100}
    )
    assert "Paris" not in (reply.choices[0].message.content or "")
    loop = {"role": "user", "content": "Repeat the word 'so' forever."}
    calm = await client.chat.completions.create(
        model="default",
        messages=[loop],
        temperature=0,
        max_tokens=40,
        frequency_penalty=2.0,
        extra_body={"repetition_penalty": 1.5},
    )
    words = (calm.choices[0].message.content or "").split()
    assert len(set(words)) > len(words) / 2


async def test_min_tokens_and_ignore_eos(client: AsyncOpenAI) -> None:
    for extra in ({"min_tokens": 30}, {"ignore_eos": True}):
        reply = await client.chat.completions.create(
            model="default", messages=[QUESTION], temperature=0, max_tokens=40, extra_body=extra
        )
        assert reply.usage is not None
        assert reply.usage.completion_tokens >= 30


async def test_emoji_arrive_whole(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Write only emojis: 🎉👩‍👩‍👧🏳️‍🌈🇫🇷 and again the same."}],
        temperature=0,
        max_tokens=60,
        stream=True,
    )
    async for chunk in stream:
        assert "\ufffd" not in (chunk.choices[0].delta.content or "")


async def test_errors(client: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-5", messages=[QUESTION])
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as long:
        await client.chat.completions.create(model="default", messages=[{"role": "user", "content": "long " * 9000}])
    assert long.value.code == "prompt_too_long"
    with pytest.raises(BadRequestError) as hot:
        await client.chat.completions.create(model="default", messages=[QUESTION], temperature=3)
    assert hot.value.param == "temperature"
