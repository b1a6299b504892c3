"""Traces: both formats are read, scaling keeps order and shared prefixes, bad rows are named by their line."""

import json
from collections.abc import Sequence
from itertools import pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bench.load import Material, phases
from services.bench.prompts import Vocabulary
from services.bench.spec import Spec
from services.bench.traces import MOONCAKE_BLOCK, Arrival, BadTrace, Scaling, question, read, scale

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
    "2023-11-16 18:17:04.0781490,110,27\r\n"
)
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 1536, "output_length": 4, "hash_ids": [0, 1, 9]},
    {"timestamp": 4000, "input_length": 30, "output_length": 7, "hash_ids": [40000]},
]
MOONCAKE_LINES = [json.dumps(row) for row in MOONCAKE]


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def test_azure() -> None:
    arrivals = read("conv.csv", AZURE.splitlines(keepends=True))
    assert [(arrival.input_tokens, arrival.output_tokens) for arrival in arrivals] == [(4808, 10), (3180, 8), (110, 27)]
    assert [arrival.at for arrival in arrivals] == pytest.approx([0, 0.052, 0.098189], abs=1e-5)


def test_mooncake() -> None:
    arrivals = read("conversation.jsonl", MOONCAKE_LINES)
    assert [arrival.at for arrival in arrivals] == [0, 0, 3]
    assert arrivals[1] == Arrival(0.0, 1536, 4, 512, (0, 1, 9))


@pytest.mark.parametrize(
    ("name", "lines", "says"),
    [
        ("a.csv", ["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2"], "line 2"),
        ("a.csv", ["TIMESTAMP,ContextTokens", "2023-11-16 18:17:03.9,1"], "line 2"),
        ("a.csv", [], "no request"),
        ("a.jsonl", [MOONCAKE_LINES[0], "{"], "line 2"),
        ("a.jsonl", ["[]"], "line 1"),
        ("a.jsonl", ['{"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [1]}'], "1 hash_ids"),
        ("a.txt", [], "Azure .csv or a Mooncake .jsonl"),
    ],
)
def test_bad_traces_name_the_line(name: str, lines: list[str], says: str) -> None:
    with pytest.raises(BadTrace, match=says):
        read(name, lines)


@st.composite
def conversations(draw: st.DrawFn) -> list[Arrival]:
    """Requests whose ids are paths in a tree, as in the real trace: an id always has the same ids before it."""
    ids: dict[tuple[int, ...], int] = {}
    arrivals, at = [], 0.0
    for _ in range(draw(st.integers(2, 8))):
        path = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=5)))
        blocks = tuple(ids.setdefault(path[: depth + 1], len(ids)) for depth in range(len(path)))
        at += draw(st.floats(0, 5))
        arrivals.append(Arrival(at, len(blocks) * MOONCAKE_BLOCK, draw(st.integers(1, 900)), blocks=blocks))
    return arrivals


@given(conversations(), st.floats(0.005, 1.5), st.floats(0.01, 10))
def test_equal_ids_are_equal_blocks_and_share_as_the_trace_does(arrivals: list[Arrival], by: float, time: float) -> None:
    scaled = [scale(arrival, Scaling(by, by, time)) for arrival in arrivals]
    assert [arrival.at for arrival in scaled] == sorted(arrival.at for arrival in scaled)
    block = max(1, round(MOONCAKE_BLOCK * by))
    prompts = [question(arrival, index, Vocabulary(), 7).prompt for index, arrival in enumerate(scaled)]
    assert [len(prompt) for prompt in prompts] == [len(arrival.blocks) * block for arrival in arrivals]
    for one, prompt in zip(arrivals, prompts, strict=True):
        for other, beside in zip(arrivals, prompts, strict=True):
            assert common(prompt, beside) == common(one.blocks, other.blocks) * block


@given(st.integers(1, 5000), st.integers(1, 2000), st.floats(0.001, 3), st.integers(1, 4000))
def test_scaled_lengths(tokens: int, output: int, by: float, most: int) -> None:
    blocks = tuple(range(-(-tokens // MOONCAKE_BLOCK)))
    for arrival in (Arrival(1.0, tokens, output), Arrival(1.0, tokens, output, blocks=blocks)):
        scaled = scale(arrival, Scaling(by, by, 2.0, most, most))
        prompt = question(scaled, 0, Vocabulary(), 0)
        assert len(prompt.prompt) == scaled.input_tokens <= most
        assert 1 <= prompt.output_tokens <= most and scaled.at == 2.0
    assert scale(arrival, Scaling()) == arrival


def test_words_share_prefixes_too_and_large_ids_differ() -> None:
    words = Vocabulary(words=True)
    one, other = (question(Arrival(0, 8, 1, 4, blocks), 0, words, 0).prompt for blocks in [(5, 7), (5, 7 + words.size)])
    assert isinstance(one, str) and isinstance(other, str)
    assert one.split()[:4] == other.split()[:4] and one.split()[4:] != other.split()[4:]


def test_a_trace_without_ids_shares_nothing() -> None:
    prompts = [question(Arrival(0, 50, 1), index, Vocabulary(), 0).prompt for index in range(2)]
    assert prompts[0][:3] != prompts[1][:3]


def test_replay_keeps_the_order_and_can_be_cut() -> None:
    found = Material(arrivals=read("x.jsonl", MOONCAKE_LINES))
    spec = Spec("trace", "http://127.0.0.1:1/v1", time_scale=0.5, processes=2)
    jobs = [[job.index for job in phase] for process in range(2) for phase in phases(spec, found, process)]
    assert jobs == [[0, 2], [1]]
    (short,) = phases(Spec("trace", spec.url, requests=2), found, 0)
    assert [job.index for job in short] == [0, 1]
    (early,) = phases(Spec("trace", spec.url, duration=2.0), found, 0)
    assert all(one.at <= two.at for one, two in pairwise(list(early)))
