"""Which way of computing a layer is the fastest on this card, measured once for each number of rows that it matters for.

What was measured is kept in the user's cache, by card, compiler and shape: a later start reads it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
import triton
from torch import Tensor

from services.engine.form import Form

ROTATE = 4  # weights that a measurement takes in turn, so that none is found in the cache
BETTER = 0.98  # of the library's time, for our own to be chosen
REPEAT = 20


class Measured(Form):
    """A layer's weight [columns out, columns in], and what is to be measured for it.

    `adds`: it is used, and so measured, to add its answer to a residual.
    """

    counts: tuple[int, ...] = ()  # the numbers of rows that it has a choice for, least first

    def __init__(self, weight: Tensor, dtype: torch.dtype, adds: bool = False) -> None:
        self.weight, self.dtype, self.adds = weight, dtype, adds

    def race(self, alike: Sequence[Self], rows: int) -> list[int]:
        """The best of our own ways, or nothing where the library is as good; `alike`: layers of one shape."""
        raise NotImplementedError

    def choose(self, rows: int, found: list[int]) -> None:
        raise NotImplementedError


def tune(layers: Iterable[Sequence[Form]]) -> None:
    """`layers`: forms of one shape each; what is found for the first few serves all of them."""
    kept = _read()
    for forms in layers:
        alike = [form for form in forms if isinstance(form, Measured)]
        for rows in alike[0].counts if alike and alike[0].weight.is_cuda else ():
            key = _key(alike[0], rows)
            if key not in kept:
                kept[key] = alike[0].race(alike[:ROTATE], rows)
            for form in alike:
                form.choose(rows, kept[key])
    _write(kept)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call, as part of a CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(REPEAT):
        graph.replay()
    end.record()
    end.synchronize()
    took: float = begin.elapsed_time(end)
    return took / REPEAT


def _key(form: Measured, rows: int) -> str:
    shape, kind = "x".join(map(str, form.weight.shape)), f"{type(form).__name__}{' adding' if form.adds else ''}"
    return f"{torch.cuda.get_device_name()} triton {triton.__version__} {kind} {form.dtype} {shape} {rows}"


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace" / "products.json"


def _read() -> dict[str, list[int]]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(_path().read_text()))
    return {}


def _write(kept: dict[str, list[int]]) -> None:
    with contextlib.suppress(OSError):  # a read-only home only costs the next start its seconds
        _path().parent.mkdir(parents=True, exist_ok=True)
        _path().write_text(json.dumps(kept))
