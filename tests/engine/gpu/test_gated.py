"""Gate, up and activation: both ways give the same, and the kernel is used where it won."""

import pytest
import torch
from torch import Tensor

from kernels.hopper_swiglu import reference, serves
from kernels.rms_norm import reference_factor
from services.engine.gpu.gated import Gated
from services.engine.gpu.product import Product
from services.engine.spec import BadModel
from tests.engine.conftest import Writer
from tests.engine.gpu.conftest import Opener
from tests.engine.reference import make_config, make_tensors
from tests.kernels.paged import error, random

EPS = 1e-5


def made(device: torch.device, dtype: torch.dtype) -> tuple[Gated, Tensor]:
    """A layer and an input of 130 rows."""
    weight = random(2 * 136, 64, dtype=dtype, device=device) / 8
    return Gated(weight, dtype, Product, EPS), 9 * random(130, 64, dtype=dtype, device=device)


def wanted_of(gated: Gated, x: Tensor) -> Tensor:
    return reference(x, reference_factor(x, EPS), gated.weight)


def test_apart() -> None:
    gated, x = made(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    assert error(gated(x), wanted_of(gated, x)) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_both_ways() -> None:
    gated, x = made(torch.device("cuda"), torch.bfloat16)
    if not serves(gated.weight):
        pytest.skip("needs a Hopper GPU")
    gated.choose(256, [256])
    wanted = wanted_of(gated, x)
    assert error(gated(x), wanted) < 3e-3
    assert error(gated(x[:128]), wanted[:128]) < 6e-3


def test_each_measured_count_stands_for_those_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, x = made(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    monkeypatch.setattr("services.engine.gpu.gated.swiglu", lambda x, factor, weight: x)
    for rows in (128, 8192):
        gated.choose(rows, [rows])
    gated.choose(256, [])
    fused = [gated(x[:1].repeat(rows, 1)).shape[1] == 64 for rows in (64, 65, 128, 129, 9000)]
    assert fused == [False, True, True, False, True]


def test_a_width_that_has_no_turns_is_refused(hub: Writer, open_gpu: Opener) -> None:
    config = make_config("LlamaForCausalLM", intermediate_size=92)
    with pytest.raises(BadModel, match="multiple of 8"):
        open_gpu(hub(config, make_tensors(config)))
