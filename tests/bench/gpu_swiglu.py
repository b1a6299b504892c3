"""An MLP's gate, up and activation in one, on a Hopper GPU: checked against float64, then timed, beside the library's product.

    python -m tests.bench.gpu_swiglu [--tokens N ...] [--tiles NAME ...] [--passes N]

One JSON line a measurement, a table last. A tile that does not compile or run says so, and the others go on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.hopper_swiglu import Tile, interleaved, reference, swiglu
from kernels.silu_mul import silu_mul
from tests.bench.gpu_kernels import GPU, Timed, median, say
from tests.kernels.paged import error, random

HIDDEN, WIDE = 4096, 14336
ROTATE = 4  # weights taken in turn, so that none is found in the cache
SUSTAINED = 0.15  # seconds a measurement lasts: a card gives its first milliseconds more power than it can keep up
CHECKED = (1, 63, 1024, 1500, 8192)
REPEATS = 10  # runs that must give the same bits: a race shows
TILES = (
    Tile(2, 64, 256, 4, 16), Tile(2, 64, 256, 4, 8), Tile(2, 64, 256, 4, 32),
    Tile(2, 128, 128, 4, 8), Tile(2, 128, 128, 4, 16),
    Tile(3, 64, 256, 3, 8), Tile(3, 64, 256, 3, 16),
)  # fmt: skip
Way = Callable[[Tensor, Tensor], Tensor]


def name(tile: Tile) -> str:
    return "x".join(map(str, asdict(tile).values()))


def poison(*shape: int, **kind: Any) -> Tensor:
    return torch.full(shape, float("nan"), **kind)


def check(tile: Tile, weight: Tensor) -> Iterator[dict[str, Any]]:
    for tokens in CHECKED:
        x = random(tokens, HIDDEN, dtype=torch.bfloat16, device=GPU)
        with patch.object(torch, "empty", poison):
            out = swiglu(x, weight, tile)
        found = error(out, reference(x, weight))
        same = all(torch.equal(swiglu(x, weight, tile), out) for _ in range(REPEATS))
        ok = found < 3e-3 and same
        yield {"what": "check", "tile": name(tile), "tokens": tokens, "error": found, "repeats_equal": same, "ok": ok}


def sustained(calls: list[Timed]) -> float:
    """Seconds a call, of a CUDA graph of all of them, replayed for SUSTAINED seconds."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = median(graph.replay, 3)
    return median(graph.replay, max(5, int(SUSTAINED / once))) / len(calls)


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
               "runs": [round(one * 1e3, 4) for one in took]}  # fmt: skip


def checked(tiles: list[Tile], weight: Tensor) -> Iterator[dict[str, Any]]:
    for tile in tiles:
        try:
            yield from check(tile, weight)
        except Exception as problem:  # noqa: BLE001
            yield {"what": "check", "tile": name(tile), "ok": False, "problem": repr(problem)[:600]}


def rows(tiles: list[Tile], tokens: list[int], weights: list[Tensor], passes: int) -> Iterator[dict[str, Any]]:
    wrong = set()
    for row in checked(tiles, interleaved(weights[0])):
        if not row["ok"]:
            wrong.add(row["tile"])
        yield row
    torch.cuda.empty_cache()
    ways: dict[str, Way] = {"library and silu_mul": apart, "library alone": linear}
    ways |= {f"fused {name(tile)}": partial(swiglu, tile=tile) for tile in tiles if name(tile) not in wrong}
    for count in tokens:
        yield from measure(count, ways, weights, passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--tiles", nargs="+", choices=[name(tile) for tile in TILES], default=[name(tile) for tile in TILES])
    parser.add_argument("--passes", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    table: list[dict[str, Any]] = [{"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__}]
    weights = [random(2 * WIDE, HIDDEN, dtype=torch.bfloat16, device=GPU) * HIDDEN**-0.5 for _ in range(ROTATE)]
    for groups in (2, 3):  # apart, so that what hangs does not take the other's figures with it
        tiles = [tile for tile in TILES if tile.groups == groups and name(tile) in arguments.tiles]
        for row in rows(tiles, arguments.tokens, weights, arguments.passes) if tiles else ():
            say(json.dumps(row))
            table.append(row)
    say("\n".join("  ".join(str(value) for value in row.values()) for row in table))


if __name__ == "__main__":
    main()
