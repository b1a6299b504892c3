"""The forms of a linear layer against the plain product."""

import pytest
import torch

from kernels.cpu import jit
from services.engine import linear
from services.engine.choose import Best, Chosen
from services.engine.form import gate, plain
from services.engine.linear import FORMS, Dense
from services.engine.matrix import Grouped, stack
from services.engine.norm import Norm

native = pytest.mark.skipif(not jit.available(), reason="no AVX2 here")


def make(rows: int, columns: int) -> Grouped:
    random = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 32, generator=random) * 0.02
    return Grouped(codes, scale, -8 * scale + torch.rand(scale.shape, generator=random) * 0.01)


@pytest.mark.parametrize(("form", "limit"), [("float32", 1e-5), ("bfloat16", 0.01), ("int4", 0.01)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_forms(form: str, limit: float, tokens: int) -> None:
    matrix = stack([make(64, 96), make(32, 96)])
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 30  # one column far larger than the rest, as real activations have
    assert isinstance(matrix, Grouped)
    plain = x @ matrix.dense().t()
    assert (FORMS[form](matrix)(x).float() - plain).norm() < limit * plain.norm()


def test_int4_keeps_the_weights() -> None:
    """Read back through an identity, the packed weights are the file's, up to the bfloat16 of scale and zero."""
    matrix = make(32, 64)
    error = (FORMS["int4"](matrix)(torch.eye(64)).float().t() - matrix.dense()).abs()
    assert (error <= matrix.scale.repeat_interleave(32, 1) / 4 + 1e-3).all()


@native
@pytest.mark.parametrize("before", [plain, gate, Norm(torch.rand(96) + 0.5, 1e-5)], ids=["plain", "gate", "norm"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9, 19])
@pytest.mark.parametrize("outputs", [64, 24])  # in tiles of as many lanes as the machine has, and of eight
def test_native_does_what_comes_before_and_adds(before: linear.Before, dense: bool, tokens: int, outputs: int) -> None:
    matrix = make(outputs, 96).dense() if dense else make(outputs, 96)
    random = torch.Generator().manual_seed(tokens)
    x = 20 * torch.randn(tokens, 192 if before is gate else 96, generator=random)  # large: silu's ends, too
    onto = torch.randn(tokens, outputs, generator=random)
    expected = onto + before(x) @ linear.dense(matrix).t()
    y = FORMS["native"](matrix)(x, before, onto.clone())
    assert (y - expected).norm() < 0.02 * (expected - onto).norm()


@native
def test_native_keeps_8_bit_weights() -> None:
    """What a file has in groups of 8-bit codes is multiplied as it is: 16-bit activations round no more than float32 sums."""
    codes = torch.randint(-127, 128, (16, 64), dtype=torch.int8)
    codes[:, ::32] = 127  # the largest of each group, as in Q8_0
    weight = (codes.view(16, 2, 32) * (torch.rand(16, 2, 1) + 0.1)).view(16, 64)
    x = torch.randn(5, 64)
    y, expected = FORMS["native"](weight)(x).double(), x.double() @ weight.double().t()
    assert (y - expected).norm() < 1e-4 * expected.norm()


@native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_native_rows_do_not_know_each_other(threads: int) -> None:
    """Nor does it matter who helps: helpers come and go at any moment, here more of them than there are cores."""
    before, form, x = torch.get_num_threads(), FORMS["native"](make(64, 96)), torch.randn(11, 96)
    torch.set_num_threads(threads)
    alone = torch.cat([form(row.unsqueeze(0)) for row in x])
    for _ in range(50):
        assert form(x).equal(alone) and form(x[:2]).equal(alone[:2])
    torch.set_num_threads(before)


@native
def test_zero_rows_stay_zero() -> None:
    assert FORMS["native"](make(32, 64))(torch.zeros(3, 64)).abs().max() == 0


@native
def test_nan_stays_in_its_row() -> None:
    _stays(FORMS["native"](make(32, 64)), torch.nan)


@native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_native_says_what_is_not_finite(bad: float) -> None:
    _stays(FORMS["native"](make(32, 64)), bad)
    _stays(FORMS["native"](make(32, 64).dense()), bad)


def _stays(form: linear.Form, bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 3] = bad
    y = form(x)
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()


def test_chosen_uses_each_form_where_it_won() -> None:
    matrix = make(32, 64)
    chosen = Chosen(matrix, ("int4", "int4", "bfloat16", "bfloat16", "bfloat16", "float32"))
    dtypes = [form.weight.dtype if isinstance(form, Dense) else None for form in chosen.forms]
    assert dtypes == [None, None, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    x = torch.randn(200, 64)
    for tokens in (1, 2, 4, 5, 16, 17, 64, 65, 200):
        plain = x[:tokens] @ matrix.dense().t()
        assert (chosen(x[:tokens]).float() - plain).norm() < 0.02 * plain.norm()


def test_best_measures_a_shape_once() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = Best(("native", "int4", "float32"))
    for rows in (32, 32, 64):
        best(make(rows, 64))
    torch.set_num_threads(threads)
    assert set(best.chosen) == {(32, 64), (64, 64)}
