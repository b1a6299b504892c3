"""Sampling on the device: its support against the plain rules, its frequencies against chance, its bad rows marked."""

import pytest
import torch

from kernels import penalize, sample
from tests.kernels.paged import error

Case = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
CASES: list[Case] = [
    (0.7, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.3, 0, 1.0, 0.05),
    (0.9, 40, 0.6, 0.01),
    (1.0, 1, 1.0, 0.0),
    (2.0, 0, 0.999, 0.0),
]


def rules(device: torch.device, rows: list[int], cases: list[Case], seeds: list[int]) -> sample.Rules:
    heat, k, p, low = zip(*cases, strict=True)
    return sample.Rules(
        rows=torch.tensor(rows, dtype=torch.int32, device=device),
        slots=torch.arange(len(rows), dtype=torch.int32, device=device).flip(0),
        temperature=torch.tensor(heat, device=device),
        top_k=torch.tensor(k, dtype=torch.int32, device=device),
        top_p=torch.tensor(p, device=device),
        min_p=torch.tensor(low, device=device),
        seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
    )


def draw(logits: torch.Tensor, given: sample.Rules, filtered: bool = True) -> list[int]:
    newest = torch.full((len(given.rows),), -9, dtype=torch.int32, device=logits.device)
    out = sample.sample(logits, given, newest, filtered)
    assert newest.flip(0).tolist() == [max(token, 0) for token in out.tolist()]
    return out.tolist()


@pytest.mark.parametrize("vocab", [131, 5000])
@pytest.mark.parametrize("flat", [False, True])
def test_support(vocab: int, flat: bool, device: torch.device) -> None:
    """Flat logits leave more candidates than there is room for, or none near enough: the slow way must answer as well."""
    logits = torch.randn(2, vocab, device=device) * (0.1 if flat else 4)
    cases = [*CASES, (0.0, 0, 1.0, 0.0)]
    got = draw(logits, rules(device, [at % 2 for at in range(len(cases))], cases, list(range(len(cases)))))
    for at, (token, (heat, k, p, low)) in enumerate(zip(got, cases, strict=True)):
        if heat == 0:
            assert token == int(logits[at % 2].argmax())
        else:
            assert bool(sample.support(logits[at % 2].cpu(), heat, k, p, low)[token])


def test_frequencies(device: torch.device) -> None:
    """A chi-square over 20 tokens: under 43.8 with probability 0.999, and the noise is fixed by the seeds."""
    torch.manual_seed(5)
    logits = torch.randn(1, 20, device=device)
    heat, count = 0.8, 300
    given = rules(device, [0] * count, [(heat, 0, 1.0, 0.0)] * count, [7919 * at for at in range(count)])
    found = torch.bincount(torch.tensor(draw(logits, given, filtered=False)), minlength=20).double()
    wanted = (logits[0].cpu().double() / heat).softmax(0) * count
    assert float(((found - wanted).square() / wanted).sum()) < 43.8


def test_whole_support_is_reached(device: torch.device) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 300, device=device) / 4
    given = rules(device, [0] * 24, [(1.0, 3, 1.0, 0.0)] * 24, list(range(24)))
    assert set(draw(logits, given)) == set(logits[0].topk(3).indices.tolist())


def test_a_draw_depends_on_its_seed_alone(device: torch.device) -> None:
    logits = torch.randn(3, 777, device=device)
    alone = [draw(logits[at : at + 1], rules(device, [0], [CASES[0]], [at]))[0] for at in range(3)]
    assert draw(logits, rules(device, [0, 1, 2], [CASES[0]] * 3, [0, 1, 2])) == alone


def test_bad_rows_and_masked_ones(device: torch.device) -> None:
    logits = torch.randn(5, 300, device=device)
    logits[0, 17] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, :299] = -torch.inf
    for heat in (0.0, 1.0):
        got = draw(logits, rules(device, [0, 1, 2, 3, 4], [(heat, 0, 1.0, 0.0)] * 5, [1] * 5), filtered=False)
        assert got[:4] == [-1, -1, -1, 299]
        assert got[4] >= 0


def test_equal_logits_give_the_first(device: torch.device) -> None:
    logits = torch.zeros(1, 5000, device=device)
    logits[0, [4000, 77, 2999]] = 1.0
    assert draw(logits, rules(device, [0], [(0.0, 0, 1.0, 0.0)], [0]), filtered=False) == [77]


def test_penalties(device: torch.device) -> None:
    logits = torch.randn(3, 5000, device=device)
    seen = torch.randint(0, 4, (5, 5000), dtype=torch.int32, device=device)
    seen += torch.randint(0, 2, seen.shape, dtype=torch.int32, device=device) * penalize.IN_PROMPT
    slots = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    repetition, frequency, presence = (
        torch.tensor(v, device=device) for v in ([1.3, 1.0, 1.0], [0.0, 0.5, 0.0], [0.2, -1, 0.0])
    )
    wanted = penalize.reference(logits, slots, seen, repetition, frequency, presence)
    penalize.penalize(logits, slots, seen, repetition, frequency, presence)
    assert error(logits, wanted) < 1e-6
