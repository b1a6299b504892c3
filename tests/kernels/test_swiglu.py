"""Gate, up and activation in one: against float64, ragged in every direction, outputs poisoned; which programs are chosen."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.hopper_swiglu import groups_for, reference, serves, swiglu
from kernels.silu_mul import in_turns
from tests.kernels.paged import error, random


def weights(hidden: int, wide: int, device: torch.device) -> Tensor:
    return random(2 * wide, hidden, dtype=torch.bfloat16, device=device) * hidden**-0.5


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN."""

    def full(*shape: int, **kind: Any) -> Tensor:
        return torch.full(shape, float("nan"), **kind)

    monkeypatch.setattr(torch, "empty", full)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize(("tokens", "hidden", "wide"), [(1, 64, 8), (63, 96, 136), (300, 576, 1536), (1500, 4096, 14336)])
def test_swiglu(tokens: int, hidden: int, wide: int, groups: int, device: torch.device) -> None:
    weight = weights(hidden, wide, device)
    if not serves(weight):
        pytest.skip("needs a Hopper GPU")
    x = random(tokens, hidden + 24, dtype=torch.bfloat16, device=device)[:, 8 : 8 + hidden]
    factor = torch.rand(tokens, device=device) + 0.5
    out = swiglu(x, factor, weight, groups)
    assert error(out, reference(x, factor, weight)) < 3e-3
    assert all(torch.equal(swiglu(x, factor, weight, groups), out) for _ in range(5))


def test_reference_is_the_activation_of_two_products(device: torch.device) -> None:
    x, gate, up = (torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((3, 16), (24, 16), (24, 16)))
    factor = torch.rand(3, dtype=torch.float64, device=device)
    normed = x * factor.unsqueeze(1)
    wanted = torch.nn.functional.silu(normed @ gate.t()) * (normed @ up.t())
    assert error(reference(x, factor, in_turns(torch.cat((gate, up)))), wanted) < 1e-12


def test_the_programs_that_end_first() -> None:
    """On 132 processors with 112 tiles of columns: 7 rounds of 128 rows end before 6 of 192, 28 of 128 after 19 of 192."""
    assert [groups_for(tokens, 112 * 256, 132) for tokens in (1024, 2048, 4096, 8192)] == [2, 2, 3, 3]
