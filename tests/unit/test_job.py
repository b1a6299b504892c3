"""A request in an engine: choices that were complete in the log but for the word that they are."""

import pytest

from services.engine.job import Job
from shared.bus import START
from shared.fields import pack_ids
from shared.messages import Sampling, Work
from shared.tokenlog import Follower


def job(outputs: list[list[int]], min_tokens: int = 0) -> Job:
    work = Work(
        request="r", tenant="t", partition="p", log_from=START, generation=1, given=(), ends=(), prompt=pack_ids([1, 2]),
        root=bytes(16), blocks=b"", sampling=Sampling(n=len(outputs), stop_ids=(7,), min_tokens=min_tokens), max_tokens=4,
        deadline_ms=0, tokenize_ms=0.0, resume=True,
    )  # fmt: skip
    choices = Follower(1, len(outputs), [pack_ids(ids) for ids in outputs]).choices
    return Job(work, "5-0", 0.0, choices)


@pytest.mark.parametrize(
    ("outputs", "min_tokens", "complete"),
    [
        ([[]], 0, {}),
        ([[1, 2, 3]], 0, {}),
        ([[1, 2, 3, 4]], 0, {0: "length"}),
        ([[1, 7]], 0, {0: "stop"}),
        ([[1, 7]], 3, {}),
        ([[7], [1, 2], [1, 2, 3, 9]], 0, {0: "stop", 2: "length"}),
    ],
)
def test_complete(outputs: list[list[int]], min_tokens: int, complete: dict[int, str]) -> None:
    resumed = job(outputs, min_tokens)
    assert resumed.complete() == complete
    for choice, reason in resumed.complete().items():
        assert resumed.end(choice, reason, 1.0).count == len(outputs[choice])  # type: ignore[arg-type]
    assert {sequence.choice for sequence in resumed.sequences(16)} == set(range(len(outputs))) - complete.keys()
    assert resumed.complete() == {}
