"""An MLP's gate, up and activation in one, on a Hopper GPU: checked against float64, then timed, beside the library's product.

    python -m tests.bench.gpu_swiglu [--tokens N ...] [--groups 2 3] [--passes N]

One JSON line a measurement, a table last. "chosen" is what an engine runs where the kernel is the faster way.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.hopper_swiglu import reference, swiglu
from kernels.silu_mul import in_turns, silu_mul
from tests.bench.gpu_kernels import GPU, Timed, graph_of, median, say
from tests.kernels.paged import error, random

HIDDEN, WIDE = 4096, 14336
ROTATE = 4  # weights taken in turn, so that none is found in the cache
SUSTAINED = 0.15  # seconds a measurement lasts: a card gives its first milliseconds more power than it can keep up
CHECKED = (1, 63, 1024, 1500, 8192)
TIMED = (256, 512, 640, 1024, 1100, 1500, 2048, 2500, 3000, 4096, 6000, 8192)  # an engine's steps have any number of tokens
REPEATS = 10  # runs that must give the same bits: a race shows
Way = Callable[[Tensor, Tensor], Tensor]


def poison(*shape: int, **kind: Any) -> Tensor:
    return torch.full(shape, float("nan"), **kind)


def check(groups: int, weight: Tensor) -> Iterator[dict[str, Any]]:
    for tokens in CHECKED:
        x = random(tokens, HIDDEN, dtype=torch.bfloat16, device=GPU)
        with patch.object(torch, "empty", poison):
            out = swiglu(x, weight, groups)
        found = error(out, reference(x, weight))
        same = all(torch.equal(swiglu(x, weight, groups), out) for _ in range(REPEATS))
        ok = found < 3e-3 and same
        yield {"what": "check", "groups": groups, "tokens": tokens, "error": found, "repeats_equal": same, "ok": ok}


def sustained(calls: list[Timed]) -> float:
    """Seconds a call, of a CUDA graph of all of them, replayed for SUSTAINED seconds."""
    graph = graph_of(calls)
    once = median(graph.replay, 3)
    return median(graph.replay, max(5, int(SUSTAINED / once))) / len(calls)


def host(call: Timed) -> float:
    """Seconds that starting it takes the host."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        call()
    return (time.perf_counter() - begin) / 20


def apart(x: Tensor, weight: Tensor) -> Tensor:
    return silu_mul(linear(x, weight))


def measure(tokens: int, ways: dict[str, Way], weights: list[Tensor], passes: int) -> Iterator[dict[str, Any]]:
    """Every way in turn, `passes` times: a card that grows warm is warm for all of them."""
    x = random(tokens, HIDDEN, dtype=torch.bfloat16, device=GPU)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(passes):
        for way, call in ways.items():
            times[way].append(sustained([partial(call, x, weight) for weight in weights]))
    for way, took in times.items():
        middle = statistics.median(took)
        yield {"what": "time", "tokens": tokens, "by": way, "ms": round(middle * 1e3, 4),
               "tflop_s": round(4 * tokens * HIDDEN * WIDE / middle / 1e12, 1),
               "host_us": round(host(partial(ways[way], x, weights[0])) * 1e6, 1),
               "runs": [round(one * 1e3, 4) for one in took]}  # fmt: skip


def rows(tokens: list[int], groups: list[int], passes: int) -> Iterator[dict[str, Any]]:
    weights = [random(2 * WIDE, HIDDEN, dtype=torch.bfloat16, device=GPU) * HIDDEN**-0.5 for _ in range(ROTATE)]
    for number in groups:
        yield from check(number, in_turns(weights[0]))
    torch.cuda.empty_cache()
    ways: dict[str, Way] = {"library and silu_mul": apart, "library alone": linear, "chosen": swiglu}
    ways |= {f"{number} groups": partial(swiglu, groups=number) for number in groups}
    for count in tokens:
        yield from measure(count, ways, weights, passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TIMED)
    parser.add_argument("--groups", type=int, nargs="+", choices=[2, 3], default=[2, 3])
    parser.add_argument("--passes", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    table = [{"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__}]
    for row in rows(arguments.tokens, arguments.groups, arguments.passes):
        say(json.dumps(row))
        table.append(row)
    say("\n".join("  ".join(str(value) for value in row.values()) for row in table))


if __name__ == "__main__":
    main()
