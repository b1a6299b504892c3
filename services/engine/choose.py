"""Which form of a linear layer to use: it depends on the machine and on how many rows x has, so the forms race."""

import math
import time
from bisect import bisect_left

import torch
from torch import Tensor

from kernels.cpu import grouped, jit
from services.engine.form import Before, Form, plain
from services.engine.linear import FORMS, Native
from services.engine.matrix import Grouped, Matrix

MEASURED = (1, 4, 8, 16, 32, 64)  # numbers of rows at which forms are compared
SPREAD = 0.65  # threads share our kernel better than the library's products of few rows
TOGETHER = 32  # rows up to which our kernel has no rival: one other layer, and a step is no longer one program (`Layers`)
RACE = 0.015  # seconds for one comparison


def possible(name: str, matrix: Matrix) -> bool:
    """Whether this machine can do it, and whether it is worth a comparison: our kernel yields only to bfloat16 that has
    instructions of its own."""
    shape = (matrix.codes if isinstance(matrix, Grouped) else matrix).shape
    native = jit.available() and grouped.fits(*shape)
    if name == "native":
        return native
    if name == "bfloat16":
        return not native or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return not native and (name != "int4" or isinstance(matrix, Grouped))


class Chosen(Form):
    """Several forms of one layer, each used for the numbers of rows it is best at."""

    def __init__(self, matrix: Matrix, names: tuple[str, ...]) -> None:
        made = {name: FORMS[name](matrix) for name in sorted(set(names))}
        self.forms = tuple(made[name] for name in names)

    def __call__(self, x: Tensor, before: Before = plain, onto: Tensor | None = None) -> Tensor:
        return self.at(len(x))(x, before, onto)

    def at(self, rows: int) -> Form:
        return self.forms[bisect_left(MEASURED, min(rows, MEASURED[-1]))]


def native_at(form: Form, rows: int) -> Native | None:
    """Our own kernel, if that is what multiplies so many rows."""
    found = form.at(rows) if isinstance(form, Chosen) else form
    return found if isinstance(found, Native) else None


class Best:
    """Makes layers of the forms that are fastest here. Each shape of layer is measured once."""

    def __init__(self, candidates: tuple[str, ...]) -> None:
        self.candidates = candidates
        self.chosen: dict[tuple[int, ...], tuple[str, ...]] = {}

    def __call__(self, matrix: Matrix) -> Form:
        shape = tuple((matrix.codes if isinstance(matrix, Grouped) else matrix).shape)
        if shape not in self.chosen:
            self.chosen[shape] = self.measure(matrix, shape[1])
        return Chosen(matrix, self.chosen[shape])

    def measure(self, matrix: Matrix, columns: int) -> tuple[str, ...]:
        """The best form's name for each of MEASURED.

        Call it with torch on one thread. From many rows to few, a form is left only for one that is a tenth faster,
        lest noise hold all weights twice.
        """
        forms = {name: FORMS[name](matrix) for name in self.candidates if possible(name, matrix)}
        chosen: list[str] = []
        for rows in reversed(MEASURED):
            if "native" in forms and rows <= TOGETHER:
                chosen.append("native")
                continue
            x = torch.randn(rows, columns)
            took = _race(forms, x)
            if "native" in took:
                took["native"] *= SPREAD
            if chosen:
                took[chosen[-1]] *= 0.9
            chosen.append(min(took, key=took.__getitem__))
        return tuple(reversed(chosen))


def _race(forms: dict[str, Form], x: Tensor) -> dict[str, float]:
    """The best of each form's times, in seconds of this one thread's CPU: a busy machine hardly changes them."""
    best = dict.fromkeys(forms, math.inf)
    until = time.thread_time() + RACE
    while time.thread_time() < until or math.inf in best.values():
        for name, form in forms.items():
            begin = time.thread_time()
            form(x)
            best[name] = min(best[name], time.thread_time() - begin)
    return best
