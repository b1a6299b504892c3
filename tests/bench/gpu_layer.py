"""A transformer layer on a GPU without its attention, beside its four products alone: what everything between them costs.

    python -m tests.bench.gpu_layer [SHAPE] [--tokens N ...] [--deterministic]

A CUDA graph over a few layers of random weights, as an engine runs them; one JSON line for each number of tokens. Attention is
left out (what the queries are goes on instead): gpu_kernels.py has it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from services.engine.gpu.build import makers_of
from services.engine.gpu.llama import Llama
from services.engine.gpu.tune import ROTATE, tune
from services.engine.spec import from_config
from services.engine.weights import Layer, Random, build
from shared.shapes import SHAPES
from tests.bench.gpu_kernels import BLOCK_SIZE, GPU, say
from tests.bench.gpu_swiglu import sustained
from tests.kernels.paged import random

TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)


def model_of(shape: str, deterministic: bool) -> Llama:
    """So many layers that none is found in the cache."""
    spec = replace(from_config(SHAPES[shape]), layers=ROTATE)
    parameters = build(spec, Random(GPU, torch.bfloat16), makers_of(spec, torch.bfloat16, deterministic), paired=True)
    tune(zip(*((layer.qkv, layer.out, layer.gate_up, layer.down) for layer in parameters.layers), strict=True))
    return Llama(spec, parameters, max(TOKENS))


def whole(model: Llama, tokens: int) -> list[Callable[[], Tensor]]:
    spec, positions = model.spec, torch.arange(tokens, dtype=torch.int32, device=GPU)
    slots = torch.randperm(tokens, device=GPU)
    pages = torch.empty(
        -(-tokens // BLOCK_SIZE), BLOCK_SIZE, 2 * spec.kv_heads, spec.head_dim, dtype=torch.bfloat16, device=GPU
    )
    residual = random(tokens, spec.hidden, dtype=torch.bfloat16, device=GPU)

    def call(layer: Layer[Tensor]) -> Tensor:
        query = model.project(residual, layer, positions, slots, pages)
        return model.mlp(layer.out(query.flatten(1), onto=residual), layer)

    return [partial(call, layer) for layer in model.parameters.layers]


def products(model: Llama, tokens: int) -> list[Callable[[], object]]:
    """By the library, nothing added, nothing between them."""
    weights = [[form.weight for form in (layer.qkv, layer.out, layer.gate_up, layer.down)] for layer in model.parameters.layers]
    inputs = [random(tokens, weight.shape[1], dtype=torch.bfloat16, device=GPU) for weight in weights[0]]

    def call(weights: list[Tensor]) -> list[Tensor]:
        return [torch.nn.functional.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]

    return [partial(call, four) for four in weights]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", nargs="?", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--deterministic", action="store_true")
    given = parser.parse_args()
    say(json.dumps({"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__}))
    with torch.inference_mode():
        model = model_of(given.shape, given.deterministic)
        for tokens in given.tokens:
            took = [round(sustained(calls(model, tokens)) * 1e6, 2) for calls in (whole, products, whole, products)]
            say(json.dumps({"what": "layer", "tokens": tokens, "layer_us": took[::2], "products_us": took[1::2]}))


if __name__ == "__main__":
    main()
