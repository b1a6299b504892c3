"""The forms of a linear layer against the plain product."""

import pytest
import torch

from services.engine.linear import FORMS, MEASURED, Best, Chosen, Grouped, stack


def make(rows: int, columns: int) -> Grouped:
    random = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 32, generator=random) * 0.02
    return Grouped(codes, scale, -8 * scale + torch.rand(scale.shape, generator=random) * 0.01)


@pytest.mark.parametrize(("form", "limit"), [("float32", 1e-5), ("bfloat16", 0.01), ("int4", 0.01), ("int8", 0.02)])
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


def test_zero_rows_stay_zero() -> None:
    assert FORMS["int8"](make(32, 64))(torch.zeros(3, 64)).abs().max() == 0


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 64)
    x[1, 3] = torch.nan
    y = FORMS["int8"](make(32, 64))(x)
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()


def test_chosen_uses_each_form_where_it_won() -> None:
    matrix = make(32, 64)
    chosen = Chosen(matrix, ("int4", "int4", "int8", "int8", "float32"))
    kinds = [type(chosen.forms[i]).__name__ for i in range(len(MEASURED))]
    assert kinds == ["Int4", "Int4", "Int8", "Int8", "Dense"]
    x = torch.randn(200, 64)
    for tokens in (1, 2, 4, 5, 16, 17, 64, 65, 200):
        plain = x[:tokens] @ matrix.dense().t()
        assert (chosen(x[:tokens]).float() - plain).norm() < 0.02 * plain.norm()


def test_best_measures_a_shape_once() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = Best(("int4", "float32"))
    for rows in (32, 32, 64):
        best(make(rows, 64))
    torch.set_num_threads(threads)
    assert set(best.chosen) == {(32, 64), (64, 64)}
