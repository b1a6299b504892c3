"""Linear layers on a GPU: the library's product, and for very few rows the faster of it and our own, measured once.

What was measured is kept in the user's cache, by card, compiler and shape: a later start reads it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from kernels.gemv import gemv
from services.engine.form import Form

Tile = tuple[int, int, int]  # columns out, columns in, warps of a program
TILES: tuple[Tile, ...] = ((4, 512, 4), (8, 512, 4), (4, 1024, 4), (16, 256, 4))
FEW = (1, 2, 4)  # numbers of rows that our own product takes
ROTATE = 4  # weights that a measurement takes in turn, so that none is found in the cache
BETTER = 0.98  # of the library's time, for our own to be chosen
REPEAT = 20


class Product(Form):
    """x · weightᵀ in `dtype`. `tiles`: by number of rows, where our own product is the faster one."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.tiles: dict[int, Tile] = {}

    def product(self, x: Tensor) -> Tensor:
        tile = self.tiles.get(len(x))
        if tile is not None:
            return gemv(x, self.weight, self.dtype, tile)
        if x.dtype == self.dtype:
            return linear(x, self.weight)
        return torch.mm(x, self.weight.t(), out_dtype=self.dtype)


def tune(layers: Iterable[Sequence[Form]]) -> None:
    """`layers`: forms of one shape each; what is found for the first few serves all of them."""
    kept = _read()
    for forms in layers:
        products = [form for form in forms if isinstance(form, Product)]
        for rows in FEW if products and products[0].weight.is_cuda else ():
            key = _key(products[0], rows)
            if key not in kept:
                kept[key] = _race(products[:ROTATE], rows)
            for product in products if kept[key] else ():
                product.tiles[rows] = _tile(kept[key])
    _write(kept)


def _tile(kept: Sequence[int]) -> Tile:
    columns, depth, warps = kept
    return columns, depth, warps


def _key(product: Product, rows: int) -> str:
    shape = "x".join(map(str, product.weight.shape))
    return f"{torch.cuda.get_device_name()} triton {triton.__version__} {product.dtype} {shape} {rows}"


def _race(products: Sequence[Product], rows: int) -> list[int]:
    """The best tile, or nothing where the library is as good."""
    weight = products[0].weight
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best, chosen = BETTER * _time(lambda: [product.product(x) for product in products]), []
    for tile in TILES:
        took = _time(lambda tile=tile: [gemv(x, product.weight, product.dtype, tile) for product in products])  # type: ignore[misc]
        if took < best:
            best, chosen = took, list(tile)
    return chosen


def _time(call: Callable[[], object]) -> float:
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
