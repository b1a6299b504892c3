"""Can decode attention hide under the products of the same step? One layer of Llama-3.1-8B's shape, on a GPU.

    python -m tests.bench.gpu_overlap

Products are bound by arithmetic where there are many tokens, decode attention by memory, so side by side they might take the
time of the longer (as NanoFlow argues: Zhu et al. 2024). Both are put into one CUDA graph: one after the other; on two streams;
with attention's stream preferred; and with the processors parted: attention's programs fill some, the products leave these out.
"layer" is a merge step's layer, products and decode attention of the same tokens; "halves" is a decode step's rows as two
batches of half the size, one's attention beside the other's products, which then read the weights twice.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import decode_attention as decode
from kernels import decode_pieces as cut
from kernels import hopper_swiglu
from kernels.hopper_swiglu import swiglu
from kernels.silu_mul import silu_mul
from tests.bench.gpu_kernels import BLOCK_SIZE, GPU, HEAD_DIM, HEADS, KV_HEADS, SCALE, Timed, median, processors, say
from tests.kernels.paged import random

HIDDEN, WIDE, QKV = 4096, 14336, (HEADS + 2 * KV_HEADS) * HEAD_DIM
LAYERS = 4  # of a graph: none finds its weights or pages in the cache
SPLITS = (16, 32, 48)  # processors that attention gets
MERGED = ((512, 576, 512), (512, 576, 2048), (512, 576, 8192), (256, 576, 2048))  # decode rows, context, tokens of the products
HALVED = ((512, 576), (256, 2048), (128, 4096))


def products(tokens: int) -> Callable[[int], None]:
    """A layer's products, by number of the layer."""

    def made(rows: int, columns: int) -> Tensor:
        return random(rows, columns, dtype=torch.bfloat16, device=GPU) * columns**-0.5

    layers = [(made(QKV, HIDDEN), made(HIDDEN, HIDDEN), made(2 * WIDE, HIDDEN), made(HIDDEN, WIDE)) for _ in range(LAYERS)]
    x = random(tokens, HIDDEN, dtype=torch.bfloat16, device=GPU)

    def call(layer: int) -> None:
        qkv, out, gate_up, down = layers[layer]
        linear(x, qkv)
        linear(x, out)
        linear(swiglu(x, gate_up) if tokens >= 1024 else silu_mul(linear(x, gate_up)), down)

    return call


def attention(rows: int, context: int) -> Callable[[int, int], None]:
    """A layer's decode attention, by number of the layer and processors to fill."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(rows * blocks, device=GPU).to(torch.int32).view(rows, blocks)
    lengths = torch.full((rows,), context, dtype=torch.int32, device=GPU)
    query = random(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    out, spare = torch.empty_like(query), decode.scratch(rows, HEADS, KV_HEADS, HEAD_DIM, GPU)
    pieces = cut.schedule(lengths, cut.splits_for(rows))
    shape = (rows * blocks, BLOCK_SIZE, 2 * KV_HEADS, HEAD_DIM)
    layers = [torch.randn(shape, dtype=torch.bfloat16, device=GPU) for _ in range(LAYERS)]
    return lambda layer, fill: decode.decode_attention(query, layers[layer], tables, pieces, out, spare, SCALE, fill)


def timed(step: Timed) -> float:
    """Milliseconds a layer."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return 1000 * median(graph.replay) / LAYERS


def beside(compute: Callable[[int], None], attend: Callable[[int, int], None], fill: int, preferred: bool) -> Timed:
    """Each layer's attention on a stream of its own; a layer ends when both have."""
    aside = torch.cuda.Stream(GPU, priority=-5 if preferred else 0)

    def step() -> None:
        here = torch.cuda.current_stream()
        for layer in range(LAYERS):
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                attend(layer, fill)
            compute(layer)
            here.wait_stream(aside)

    return step


@contextmanager
def leaving(fill: int) -> Iterator[None]:
    """Products leave so many processors out."""
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(fill)
    with patch.object(hopper_swiglu, "_processors", lambda device: processors() - fill):
        yield
    torch._C._set_sm_carveout_experimental(None)
    torch.backends.cuda.preferred_blas_library(library)


def ways(compute: Callable[[int], None], attend: Callable[[int, int], None]) -> Iterator[tuple[str, float]]:
    every = processors()

    def in_turn() -> None:
        for layer in range(LAYERS):
            attend(layer, every)
            compute(layer)

    yield "products alone", timed(lambda: [compute(layer) for layer in range(LAYERS)])
    yield "attention alone", timed(lambda: [attend(layer, every) for layer in range(LAYERS)])
    yield "in turn", timed(in_turn)
    yield "two streams", timed(beside(compute, attend, every, False))
    yield "attention preferred", timed(beside(compute, attend, every, True))
    for fill in SPLITS:
        with leaving(fill):
            yield f"attention on {fill}, products on the rest", timed(beside(compute, attend, fill, True))


def merged() -> Iterator[dict[str, Any]]:
    for rows, context, tokens in MERGED:
        found = dict(ways(products(tokens), attention(rows, context)))
        yield row(f"layer: {rows} rows of {context}, {tokens} tokens", found, found["in turn"])


def halved() -> Iterator[dict[str, Any]]:
    for rows, context in HALVED:
        whole = dict(ways(products(rows), attention(rows, context)))["in turn"]
        half = dict(ways(products(rows // 2), attention(rows // 2, context)))
        pair = {way: 2 * took for way, took in half.items()}  # while one half computes, the other attends, and back
        yield row(f"halves: {rows} rows of {context}", {"whole, in turn": whole, **pair}, whole)


def row(what: str, found: dict[str, float], plain: float) -> dict[str, Any]:
    best = min((way for way in found if "alone" not in way), key=lambda way: found[way])
    return {
        "what": what,
        **{way: round(ms, 3) for way, ms in found.items()},
        "best": best,
        "gain": round(plain / found[best], 3),
    }


def main() -> None:
    torch.manual_seed(time.time_ns() % 2**31)
    say(json.dumps({"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for found in (merged, halved):
        for each in found():
            say(json.dumps(each))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
