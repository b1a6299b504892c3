"""The meter: any cut of the bytes gives the same count, and what breaks the form is named."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bench.timing import MAX_LINE, Meter, StreamFailed
from tests.bench.sse_server import event

ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
FINISH = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
DONE = b"data: [DONE]\n\n"


def chat(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": None}]}


WHOLE = event(ROLE) + b": a comment\r\n\r\n" + b"".join(event(chat(text)) for text in ("a", "é", "b\n")) + event(FINISH) + DONE


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_any_cut_counts_the_same(cuts: list[int]) -> None:
    edges = sorted({0, *cuts, len(WHOLE)})
    meter = Meter()
    for low, high in pairwise(edges):
        meter.feed(WHOLE[low:high], now=float(high))
    assert (meter.chunks, meter.output_tokens, meter.finished) == (3, 3, True)


def test_times() -> None:
    meter = Meter()
    steps = [(10.5, ROLE), (11.0, chat("a")), (11.25, chat("b")), (12.0, chat("c")), (12.1, FINISH)]
    for now, fields in steps:
        meter.feed(event(fields), now)
    meter.feed(event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}) + DONE, 13.0)
    timing = meter.timing(index=3, start=10.0, late=0.0, origin=4.0)
    assert (timing.start, timing.ttft, timing.stall, timing.chunks) == (6.0, 1.0, 0.75, 3)
    assert timing.latency == pytest.approx(2.1)
    assert (timing.input_tokens, timing.output_tokens) == (7, 5)  # the server's count beats the number of chunks
    assert timing.tpot == pytest.approx(1.1 / 4)


def test_completions_and_tokens_without_text() -> None:
    meter = Meter()
    for text, finish in (("", None), ("a", None), ("b", "length")):
        meter.feed(event({"choices": [{"text": text, "finish_reason": finish}]}), 1.0)
    assert (meter.chunks, meter.finished) == (3, True)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"data: {oops\n\n", "malformed stream"),
        (b"data: [1]\n\n", "malformed stream"),
        (b"x" * (MAX_LINE + 1), "malformed stream"),
        (event({"error": {"message": "lost"}}), "error in stream"),
        (event(chat("a")), "cut short"),
        (b"", "cut short"),
        (DONE, "empty answer"),
        (
            event({"choices": [7, {"delta": 1, "finish_reason": "x"}], "usage": {"completion_tokens": "?"}}),
            "empty answer",
        ),
    ],
)
def test_broken_streams(data: bytes, kind: str) -> None:
    meter = Meter()
    with pytest.raises(StreamFailed) as caught:
        meter.feed(data, 1.0)
        meter.timing(0, 0.0, 0.0, 0.0)
    assert caught.value.kind == kind
