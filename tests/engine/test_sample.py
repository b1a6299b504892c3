"""Sampling against naive rules, and its noise against chance."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine import sample as sampling
from services.engine.noise import uniform
from services.engine.plan import Draw, Sampled
from shared.messages import Sampling


def draw(prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), *, stop: bool = True, **fields: Any) -> Draw:
    position = fields.pop("position", len(output))
    return Draw(0, fields.pop("choice", 0), position, Sampling(**fields), prompt, output, stop)


def sample(logits: Tensor, *draws: Draw) -> list[Sampled]:
    rows = torch.arange(len(draws)) if len(logits) > 1 else torch.zeros(len(draws), dtype=torch.int64)
    return sampling.sample(logits, rows, draws, sampling.Histories())


def one_row(vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def naive_support(row: list[float], s: Sampling) -> set[int]:
    """Temperature, min-p, top-k, top-p, one after the other, in Python."""
    top = max(row)
    weights = {i: math.exp((x - top) / s.temperature) for i, x in enumerate(row)}
    weights = {i: w for i, w in weights.items() if w >= s.min_p}
    order = sorted(weights, key=lambda i: -weights[i])[: s.top_k or None]
    total, mass, kept = sum(weights[i] for i in order), 0.0, set()
    for i in order:
        if mass >= s.top_p * total * (1 + 1e-5):
            break
        kept.add(i)
        mass += weights[i]
    return kept


settled = settings(max_examples=60, deadline=None)


@settled
@given(
    st.integers(0, 99),
    st.sampled_from([0, 1, 2, 7, 40, 5000]),
    st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    st.sampled_from([0.3, 1.0, 1.9]),
    st.integers(-(2**63), 2**63 - 1),
)
def test_support(row: int, k: int, p: float, low: float, heat: float, seed: int) -> None:
    logits = one_row(50 if row % 2 else 3000, row)
    d = draw(top_k=k, top_p=p, min_p=low, temperature=heat, seed=seed)
    answers = sample(logits, *(Draw(0, 0, i, d.sampling, (), (), True) for i in range(8)))
    assert {a.token for a in answers} <= naive_support(logits[0].tolist(), d.sampling)


def chi_square(logits: Tensor, expected: Tensor, **fields: Any) -> float:
    draws = [draw(seed=seed, position=3, **fields) for seed in range(4000)]
    found = Counter(a.token for a in sample(logits, *draws))
    return sum((found[i] - 4000 * e) ** 2 / (4000 * e) for i, e in enumerate(expected.tolist()) if e > 0)


def test_distribution() -> None:
    """19 degrees of freedom: below 43.8 with probability 0.999, and the noise is fixed, so this cannot flicker."""
    logits = one_row(20) / 2
    assert chi_square(logits, (logits / 0.7).softmax(1)[0], temperature=0.7) < 43.8
    kept = logits.topk(5).values[0, -1]
    assert chi_square(logits, logits.where(logits >= kept, -torch.inf).softmax(1)[0], top_k=5) < 18.5  # 4 degrees


def test_flat_logits_need_the_whole_vocabulary() -> None:
    """Top-p over more tokens than are sorted at first."""
    logits = torch.linspace(0, 1e-3, 9000).unsqueeze(0)
    tokens = [a.token for a in sample(logits, *(draw(top_p=0.5, position=i) for i in range(300)))]
    assert min(tokens) >= 4400 and len(set(tokens)) > 250


def naive_edit(row: list[float], d: Draw) -> list[float]:
    s, out = d.sampling, list(row)
    for i in set(d.prompt + d.output):
        out[i] = out[i] / s.repetition_penalty if out[i] > 0 else out[i] * s.repetition_penalty
    for i, count in Counter(d.output).items():
        out[i] -= s.frequency_penalty * count + s.presence_penalty
    for i, bias in s.logit_bias:
        out[i] += bias
    return [-math.inf if i in s.stop_ids and not d.allow_stop else x for i, x in enumerate(out)]


ids = st.lists(st.integers(0, 11), max_size=8).map(tuple)


@settled
@given(ids, ids, st.floats(0.5, 2), st.floats(-2, 2), st.floats(-2, 2), ids.map(lambda x: x[:5]), st.booleans())
def test_edits(
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    repetition: float,
    frequency: float,
    presence: float,
    stops: tuple[int, ...],
    stop: bool,
) -> None:
    d = draw(
        prompt,
        output,
        stop=stop,
        temperature=0.0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=((3, 1.5), (7, -100.0)),
        stop_ids=stops,
    )
    logits = one_row(12, len(output))
    expected = naive_edit(logits[0].tolist(), d)
    token = sample(logits.clone(), d)[0].token
    assert expected[token] >= max(expected) - 1e-4
    assert stop or token not in stops


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    logits = one_row(12)
    strange = draw(stop=False, temperature=0.0, logit_bias=((12, 50.0), (2**31 - 1, 50.0)), stop_ids=(12, 99))
    assert sample(logits, strange)[0].token == int(logits.argmax())


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = torch.cat([one_row(3000, seed) for seed in range(6)])
    draws = [
        draw(temperature=0.0),
        draw(seed=5, top_p=0.9),
        draw(seed=6, top_k=3, logprobs=2),
        draw(seed=7, min_p=0.1),
        draw(output=(1, 2), seed=8, presence_penalty=1.0),
        draw(seed=9),
    ]
    together = sample(logits, *draws)
    assert together == [sample(logits[i : i + 1], d)[0] for i, d in enumerate(draws)]


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_logprobs_are_of_the_raw_logits(heat: float) -> None:
    logits = one_row(50)
    answer = sample(logits, draw(temperature=heat, logprobs=3, logit_bias=((4, 100.0),)))[0]
    logs = logits.log_softmax(1)[0]
    assert answer.token == 4 and answer.logprob is not None
    own, top = answer.logprob
    assert own == pytest.approx(logs[4].item(), abs=1e-5)
    assert [i for i, _ in top] == logs.topk(3).indices.tolist()
    assert [p for _, p in top] == pytest.approx(logs.topk(3).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.0, "logprobs": 1}])
def test_unsound_logits_are_marked(poison: float, fields: dict[str, Any]) -> None:
    logits = torch.cat([one_row(50, seed) for seed in range(3)])
    clean = sample(logits, *[draw(**fields)] * 3)
    logits[1, 17] = poison
    assert sample(logits, *[draw(**fields)] * 3) == [clean[0], Sampled(-1), clean[2]]


def test_noise_is_uniform_and_fixed() -> None:
    assert uniform(0, 0, 0) != uniform(0, 0, 1) != uniform(0, 1, 0) != uniform(1, 0, 0)
    numbers = [uniform(seed, choice, at) for seed in range(-20, 20) for choice in range(5) for at in range(50)]
    assert len(set(numbers)) == len(numbers) and all(0 <= x < 1 for x in numbers)
    tenths = Counter(int(10 * x) for x in numbers)
    assert sum((tenths[i] - 1000) ** 2 / 1000 for i in range(10)) < 27.9  # 9 degrees of freedom, 0.999
