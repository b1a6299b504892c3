"""Bad input gets a clear 4xx in OpenAI's form, never a 5xx, and disturbs nobody."""

import asyncio
import io
import json
from typing import Any

import pytest
from aiohttp import ClientSession
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chain import expected
from tests.mesh.client import Client, generate
from tests.mesh.harness import RunningMesh

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]

RAW = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b"\xff\xfe",
    b'{"messages": "\xc3\x28"}',
    b'{"messages":' + b"[" * 5000,
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}',
    b'{"messages":[{"role":"user","content":"a"}],"max_tokens":1e400}',
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "god", "content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": -0.1}, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": True}, "temperature"),
    (CHAT, {"messages": HELLO, "top_p": 0}, "top_p"),
    (CHAT, {"messages": HELLO, "top_k": -2}, "top_k"),
    (CHAT, {"messages": HELLO, "n": 0}, "n"),
    (CHAT, {"messages": HELLO, "n": 1000000}, "n"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": -5}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 10**12}, "max_tokens"),
    (CHAT, {"messages": HELLO, "seed": 2**70}, "seed"),
    (CHAT, {"messages": HELLO, "stop": ["a"] * 17}, "stop"),
    (CHAT, {"messages": HELLO, "stop": ""}, "stop"),
    (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": 1000}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    (CHAT, {"messages": HELLO, "tools": [{}]}, "tools"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": HELLO, "temprature": 1}, "temprature"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of"),
]

LATE: list[tuple[str, dict[str, Any], str]] = [  # what only the tokenizer can see
    (CHAT, {"messages": [{"role": "user", "content": "x " * 20000}]}, "prompt_too_long"),
    (CHAT, {"messages": HELLO, "max_tokens": 9000}, "prompt_too_long"),
    (COMPLETIONS, {"prompt": ""}, "bad_prompt"),
    (COMPLETIONS, {"prompt": [10**6]}, "bad_prompt"),
    (CHAT, {"messages": HELLO, "logit_bias": {"999999": 1}}, "bad_prompt"),
]


async def send(mesh: RunningMesh, path: str, raw: bytes) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    async with ClientSession() as client, client.post(mesh.url + path, data=io.BytesIO(raw), headers=headers) as response:
        return response.status, json.loads(await response.read())


def refused(status: int, reply: dict[str, Any]) -> dict[str, Any]:
    assert 400 <= status < 500, f"{status} {reply}"
    error: dict[str, Any] = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
async def test_what_is_not_a_request(chain_mesh: RunningMesh, raw: bytes) -> None:
    refused(*await send(chain_mesh, CHAT, raw))


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=[f"{body}"[-40:] for _, body, _ in BAD])
async def test_the_field_that_is_wrong_is_named(chain_mesh: RunningMesh, path: str, body: dict[str, Any], param: str) -> None:
    error = refused(*await chain_mesh.post(path, body))
    assert str(error["param"]).startswith(param)


@pytest.mark.parametrize(("path", "body", "code"), LATE, ids=[code + str(at) for at, (_, _, code) in enumerate(LATE)])
async def test_what_only_the_tokenizer_sees(chain_mesh: RunningMesh, path: str, body: dict[str, Any], code: str) -> None:
    assert refused(*await chain_mesh.post(path, body))["code"] == code


async def test_a_body_too_large(chain_mesh: RunningMesh) -> None:
    assert refused(*await send(chain_mesh, CHAT, b'{"x":"' + b"a" * (1 << 20) + b'"}'))["code"] == "body_too_large"


async def test_paths_and_methods(chain_mesh: RunningMesh) -> None:
    async with ClientSession() as client:
        for method, path in (
            ("GET", CHAT),
            ("POST", "/v1/nope"),
            ("DELETE", "/v1/models"),
            ("GET", "/page/../app.py"),
            ("GET", "/v1/ws"),
        ):
            async with client.request(method, chain_mesh.url + path) as response:
                refused(response.status, await response.json())


FRAMES = [
    "",
    "{",
    "[]",
    "5",
    '{"type":"nope","id":"a"}',
    '{"type":["generate"],"id":"a"}',
    '{"type":{},"id":"a"}',
    '{"type":"generate"}',
    '{"type":"generate","id":5,"messages":[]}',
    '{"type":"generate","id":"a","messages":[]}',
    '{"type":"cancel","id":"nobody"}',
    '{"type":"resume","id":"a","request":"../x","cursor":""}',
    '{"type":"resume","id":"a","request":"abc","cursor":"' + "9" * 300 + '"}',
]


async def test_bad_frames_do_not_disturb_the_socket(chain_mesh: RunningMesh) -> None:
    async with Client(chain_mesh.url) as client:
        for frame in FRAMES:
            await client.ws.send_str(frame)
            reply = await client.frame()
            assert reply["type"] == "error", frame
            assert reply["message"]
        await client.ws.send_bytes(b"\x00")
        assert (await client.frame())["code"] == "bad_frame"
        await client.send("generate", "ok", prompt=[1, 2], max_tokens=2, return_token_ids=True)
        assert (await client.frame())["type"] == "accepted"


numbers = st.integers() | st.floats() | st.booleans() | st.none()
scalars = numbers | st.text(max_size=20)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = """model messages prompt max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p repetition_penalty
frequency_penalty presence_penalty logit_bias seed n stop stop_token_ids ignore_eos stream stream_options logprobs
top_logprobs user metadata response_format tools extra"""
fields = st.sampled_from(NAMES.split())
small = {"max_tokens": 2}


async def test_fuzz(chain_mesh: RunningMesh) -> None:
    """Any JSON in any field: 200 or a 4xx in OpenAI's form. Meanwhile an innocent stream runs undisturbed."""
    innocent = asyncio.create_task(
        generate(chain_mesh.url, prompt=[4, 2], max_tokens=800, ignore_eos=True, return_token_ids=True)
    )
    seen: set[int] = set()
    cases: list[tuple[str, dict[str, Any]]] = []

    @settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from([(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "x"})]),
        st.dictionaries(fields, anything, max_size=3),
    )
    def collect(base: tuple[str, dict[str, Any]], wild: dict[str, Any]) -> None:
        cases.append((base[0], small | base[1] | wild))

    collect()
    async with ClientSession() as client:
        for path, body in cases:
            async with client.post(chain_mesh.url + path, data=json.dumps(body).encode()) as response:
                seen.add(response.status)
                if response.status != 200:
                    refused(response.status, await response.json())
    assert seen >= {200, 400}
    answer = await innocent
    assert answer.ids[0] == expected([4, 2], 800)
