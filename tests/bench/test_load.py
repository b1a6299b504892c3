"""What is asked and when: lengths are exact, arrivals are Poisson, any number of processes asks the same questions."""

import asyncio
import statistics
import time
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bench import load
from services.bench.prompts import WORDS, Question, Vocabulary, listed, shared, synthetic
from services.bench.spec import Spec, spread

URL = "http://127.0.0.1:1/v1"


@given(st.integers(1, 300), st.integers(0, 9), st.integers(0, 1 << 40), st.booleans())
def test_synthetic_lengths_are_exact(length: int, seed: int, index: int, words: bool) -> None:
    prompt = synthetic(Vocabulary(100, 200, words), length, 5, seed)(index).prompt
    assert len(prompt.split() if isinstance(prompt, str) else prompt) == length
    if isinstance(prompt, list):
        assert all(100 <= token < 200 for token in prompt)


def test_questions_differ_by_index_and_seed_and_repeat_with_them() -> None:
    ask, other = synthetic(Vocabulary(), 20, 5, 1), synthetic(Vocabulary(), 20, 5, 2)
    assert ask(0) == synthetic(Vocabulary(), 20, 5, 1)(0)
    assert len({str(question.prompt) for question in [ask(0), ask(1), other(0), other(1)]}) == 4
    assert len(set(WORDS)) == len(WORDS)


@given(st.integers(1, 60), st.integers(0, 60), st.booleans())
def test_synthetic_prompts_begin_alike_and_go_on_apart(length: int, common: int, words: bool) -> None:
    common = min(common, length)
    asked = [synthetic(Vocabulary(words=words), length, 5, 1, common)(index).prompt for index in (3, 4)]
    one, two = (prompt.split() if isinstance(prompt, str) else prompt for prompt in asked)
    assert one[:common] == two[:common]
    assert len(one) == len(two) == length
    assert length - common < 12 or one[common:] != two[common:]


def test_listed_prompts_go_round() -> None:
    ask = listed(["one", "", "  two "], 9)
    assert [ask(index).prompt for index in range(3)] == ["one", "two", "one"]
    with pytest.raises(ValueError, match="no prompt"):
        listed(["", " "], 9)


def test_the_same_question_is_one_object_per_round() -> None:
    ask = shared(synthetic(Vocabulary(), 8, 4, 0), users=3)
    questions = [ask(index) for index in range(6)]
    assert questions[0] is questions[2]
    assert questions[0] != questions[3] == questions[5]


@given(st.floats(0.1, 1000), st.integers(0, 1 << 30))
def test_poisson_rate(rate: float, seed: int) -> None:
    times = list(islice(load.poisson(rate, seed), 4001))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # Six standard errors of an exponential's mean and, roughly, of its deviation: both equal 1 / rate.
    assert statistics.mean(gaps) * rate == pytest.approx(1, abs=6 / 4000**0.5)
    assert statistics.stdev(gaps) * rate == pytest.approx(1, abs=12 / 4000**0.5)
    assert times == list(islice(load.poisson(rate, seed), 4001)) and min(gaps) >= 0


@given(st.integers(0, 50), st.integers(1, 8))
def test_spread_shares_everything(total: int, processes: int) -> None:
    shares = [spread(total, process, processes) for process in range(processes)]
    assert sum(shares) == total and max(shares) - min(shares) <= 1


@pytest.mark.parametrize("mode", ["same", "closed", "open"])
@given(users=st.integers(1, 7), requests=st.integers(1, 25), processes=st.integers(1, 5))
def test_processes_together_ask_what_one_asks(mode: str, users: int, requests: int, processes: int) -> None:
    def jobs(count: int) -> list[list[load.Job]]:
        """Per phase, the jobs of all processes in the order of their numbers."""
        spec = Spec(mode, URL, users=users, requests=requests, processes=count, input_tokens=4)  # type: ignore[arg-type]
        each = [list(map(list, load.phases(spec, load.Material(), process))) for process in range(count)]
        merged = [list(chain.from_iterable(parts)) for parts in zip(*each, strict=True)]
        assert len(merged) == spec.rounds
        return [sorted(phase, key=lambda job: job.index) for phase in merged]

    assert jobs(processes) == jobs(1)
    assert [job.index for phase in jobs(1) for job in phase] == list(range(requests))


def test_duration_ends_the_arrivals() -> None:
    spec = Spec("open", URL, rate=100.0, duration=2.0, input_tokens=1)
    (phase,) = load.phases(spec, load.Material(), 0)
    jobs = list(phase)
    assert 120 < len(jobs) < 280 and jobs[-1].at < 2.0


def test_material_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        load.material(Spec("closed", URL, prompts=str(tmp_path / "empty.txt")))
    with pytest.raises(OSError, match="absent"):
        load.material(Spec("closed", URL, prompts=str(tmp_path / "absent")))


async def test_closed_loop_keeps_to_its_users() -> None:
    under_way, most, done = 0, 0, 0

    async def ask(_job: load.Job, _due: float) -> None:
        nonlocal under_way, most, done
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        done += 1

    jobs = (load.Job(index, 0.0, Question("x", 1)) for index in range(40))
    await load.closed(jobs, 5, 0.0, None, ask)
    assert (most, done) == (5, 40)


async def test_open_loop_waits_for_nobody_and_refuses_beyond_its_limit() -> None:
    sent: list[float] = []
    refused: list[int] = []
    begin = time.monotonic()

    async def never(_job: load.Job, due: float) -> None:
        sent.append(time.monotonic() - due)
        await asyncio.sleep(0.2)

    jobs = [load.Job(index, index * 0.01, Question("x", 1)) for index in range(8)]
    await load.timed(jobs, begin, 5, never, lambda job, _due: refused.append(job.index))
    assert len(sent) == 5 and refused == [5, 6, 7]
    assert max(sent) < 0.1
