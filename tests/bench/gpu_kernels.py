"""The attention kernels on a GPU: checked against float64, then timed, beside torch's own.

    python -m tests.bench.gpu_kernels [--quick] [--only decode|prefill|hopper]

One JSON line a measurement, a table last. Decode is timed as an engine runs it: a CUDA graph over several layers' pages.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from kernels import decode_attention as decode
from kernels import prefill_attention as prefill
from kernels.hopper_prefill import hopper_prefill
from tests.kernels.paged import error, filled, random

GPU = torch.device("cuda")
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
PROCESSORS = 132
Timed = Callable[[], object]
Named = Callable[[dict[str, Tensor], Tensor], dict[str, Timed]]

DECODE_LAUNCHES = {
    "64w4s3r3": decode.Launch(64, 4, 3, 3),
    "64w4s4r2": decode.Launch(64, 4, 4, 2),
    "32w4s4r3": decode.Launch(32, 4, 4, 3),
    "32w2s4r4": decode.Launch(32, 2, 4, 4),
    "128w8s2r2": decode.Launch(128, 8, 2, 2),
}
SPLITS = {
    "64x32": decode.Splits(64, 32),
    "128x32": decode.Splits(128, 32),
    "256x32": decode.Splits(256, 32),
    "512x32": decode.Splits(512, 32),
}
SWEPT = ((1, 200), (1, 8192), (32, 200), (64, 4096), (256, 192))
MEASURED = ((1, 2048), (32, 2048), (64, 1024), (128, 192), (128, 1024), (512, 200))
PREFILL_LAUNCHES = {
    "128x128w8s2": prefill.Launch(128, 128, 8, 2),
    "128x64w8s3": prefill.Launch(128, 64, 8, 3),
}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def median(call: Timed, rounds: int = 15) -> float:
    """Seconds a call."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def captured(calls: list[Timed]) -> float:
    """Seconds a call, of a CUDA graph of all of them."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(graph.replay) / len(calls)


def decode_calls(rows: int, context: int, splits: decode.Splits, launch: decode.Launch, layers: int) -> list[Timed]:
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(rows * blocks, device=GPU).to(torch.int32).view(rows, blocks)
    lengths = torch.full((rows,), context, dtype=torch.int32, device=GPU)
    query = random(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    out = torch.empty_like(query)
    spare = decode.scratch(rows, HEADS, KV_HEADS, HEAD_DIM, splits, GPU)
    shape = (rows * blocks, BLOCK_SIZE, 2 * KV_HEADS, HEAD_DIM)
    every = [torch.randn(shape, dtype=torch.bfloat16, device=GPU) for _ in range(layers)]

    def call(pages: Tensor) -> Timed:
        return lambda: decode.decode_attention(query, pages, tables, lengths, out, spare, SCALE, PROCESSORS, launch)

    return [call(pages) for pages in every]


def measure_decode(rows: int, context: int, splits: str, launch: str) -> dict[str, Any]:
    size = rows * context * 2 * KV_HEADS * HEAD_DIM * 2
    layers = max(2, min(32, 2**31 // size))
    took = captured(decode_calls(rows, context, SPLITS[splits], DECODE_LAUNCHES[launch], layers))
    return {"what": "decode", "rows": rows, "context": context, "splits": splits, "launch": launch,
            "us": round(took * 1e6, 2), "tb_s": round(size / took / 1e12, 3)}  # fmt: skip


def check_decode(name: str, launch: decode.Launch) -> dict[str, Any]:
    lengths = [0, 1, 15, 16, 17, 255, 256, 257, 1021, 5000]
    pages, tables = filled(lengths, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.bfloat16, GPU)
    query = random(len(lengths), HEADS, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=GPU)
    wanted = decode.reference(query.double(), pages.double(), tables, on_device, SCALE)
    worst, same = 0.0, True
    for splits in SPLITS.values():
        spare = decode.scratch(len(lengths), HEADS, KV_HEADS, HEAD_DIM, splits, GPU)
        outs = []
        for _ in range(5):
            outs.append(torch.full_like(query, float("nan")))
            decode.decode_attention(query, pages, tables, on_device, outs[-1], spare, SCALE, PROCESSORS, launch)
        worst = max(worst, *(error(out, wanted) for out in outs))
        same &= all(torch.equal(out, outs[0]) for out in outs)
    return {"what": "check decode", "launch": name, "error": worst, "repeats_equal": same, "ok": worst < 1e-2 and same}


def prefill_case(new: list[int], ends: list[int], queries: int) -> dict[str, Tensor]:
    pages, tables = filled(ends, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.bfloat16, GPU)
    whole = [-(-end // prefill.GATHERED) * prefill.GATHERED for end in ends]

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32, device=GPU).cumsum(0, dtype=torch.int32)

    return {
        "query": random(sum(new), HEADS, HEAD_DIM, dtype=torch.bfloat16, device=GPU),
        "pages": pages,
        "tables": tables,
        "both": torch.full((sum(whole), 2 * KV_HEADS, HEAD_DIM), float("nan"), dtype=torch.bfloat16, device=GPU),
        "starts": starts(whole)[:-1],
        "firsts": starts(new),
        "ends": torch.tensor(ends, dtype=torch.int32, device=GPU),
        "tiles": torch.tensor(prefill.plan(new, ends, sum(whole)).tiles, dtype=torch.int32, device=GPU),
    }


def variants(case: dict[str, Tensor], out: Tensor, launch: prefill.Launch) -> dict[str, Timed]:
    query, both, starts, firsts, ends, tiles = (case[k] for k in ("query", "both", "starts", "firsts", "ends", "tiles"))
    prefill.gather(case["pages"], case["tables"], starts, ends, both, int(ends.max()))
    return {
        "paged": lambda: prefill.prefill_paged(query, case["pages"], case["tables"], firsts, ends, tiles, out, SCALE, launch),
        "gathered": lambda: prefill.prefill_gathered(query, both, starts, firsts, ends, tiles, out, SCALE, launch),
    }


def by_hand(case: dict[str, Tensor], out: Tensor) -> dict[str, Timed]:
    query, both, starts, firsts, ends, tiles = (case[k] for k in ("query", "both", "starts", "firsts", "ends", "tiles"))
    prefill.gather(case["pages"], case["tables"], starts, ends, both, int(ends.max()))
    return {f"hopper s{stages}": partial(hopper_prefill, query, both, starts, firsts, ends, tiles, out, SCALE, stages)
            for stages in (2, 3)}  # fmt: skip


def check_prefill(launch: str, queries: int, named: Named) -> Iterator[dict[str, Any]]:
    new, ends = [300, 1, 0, 128, 77], [300, 97, 5, 128, 1000]
    case = prefill_case(new, ends, queries)
    exact = (case[name].double() for name in ("query", "pages"))
    wanted = prefill.reference(*exact, case["tables"], case["firsts"], case["ends"], SCALE)
    out = torch.empty_like(case["query"])
    for variant, call in named(case, out).items():
        out.fill_(float("nan"))
        call()
        found = error(out, wanted)
        yield {"what": "check prefill", "variant": variant, "launch": launch, "error": found, "ok": found < 1e-2}


def measure_prefill(tokens: int, launch: str, queries: int, named: Named) -> Iterator[dict[str, Any]]:
    case = prefill_case([tokens], [tokens], queries)
    for variant, call in named(case, torch.empty_like(case["query"])).items():
        yield prefill_row(tokens, variant, launch, bench(call))


def prefill_row(tokens: int, variant: str, launch: str, took: float) -> dict[str, Any]:
    work = 4 * HEADS * HEAD_DIM * tokens * tokens / 2
    return {"what": "prefill", "tokens": tokens, "variant": variant, "launch": launch, "us": round(took * 1e6, 1),
            "tflop_s": round(work / took / 1e12, 1)}  # fmt: skip


def around(tokens: int) -> Iterator[dict[str, Any]]:
    """What gathering costs, and torch's own kernels."""
    case = prefill_case([tokens], [tokens], 128)
    gathering = (case["pages"], case["tables"], case["starts"], case["ends"], case["both"], tokens)
    yield prefill_row(tokens, "gather alone", "", bench(lambda: prefill.gather(*gathering)))
    yield from (prefill_row(tokens, name, "", took) for name, took in library(tokens))


def bench(call: Timed) -> float:
    return float(do_bench(call, warmup=10, rep=60, return_mode="median")) / 1000


def library(tokens: int) -> Iterator[tuple[str, float]]:
    query = random(1, HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    key, value = (random(1, KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    key, value = (half.repeat_interleave(HEADS // KV_HEADS, 1) for half in (key, value))
    for name, backend in (("torch cudnn", SDPBackend.CUDNN_ATTENTION), ("torch flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            yield name, bench(lambda: scaled_dot_product_attention(query, key, value, is_causal=True))


def copy_bandwidth() -> dict[str, Any]:
    source = torch.randn(2**29, device=GPU)
    target = torch.empty_like(source)
    return {"what": "copy", "tb_s": round(2 * source.nbytes / median(lambda: target.copy_(source)) / 1e12, 3)}


def decode_rows(quick: bool) -> Iterator[dict[str, Any]]:
    default = next(iter(DECODE_LAUNCHES))
    for name, launch in DECODE_LAUNCHES.items():
        yield check_decode(name, launch)
    for rows, context in SWEPT:
        for name in DECODE_LAUNCHES if not quick else [default]:
            yield measure_decode(rows, context, "256x32", name)
        for splits in ("64x32", "128x32", "512x32"):
            yield measure_decode(rows, context, splits, default)
    for rows, context in () if quick else MEASURED:
        yield measure_decode(rows, context, "256x32", default)


def prefill_rows(quick: bool) -> Iterator[dict[str, Any]]:
    lengths = (8192,) if quick else (8192, 2048, 512)
    for tokens in lengths:
        yield from around(tokens)
    for name, launch in PREFILL_LAUNCHES.items():
        named = partial(variants, launch=launch)
        yield from check_prefill(name, launch.queries, named)
        for tokens in lengths:
            yield from measure_prefill(tokens, name, launch.queries, named)


def hopper_rows(quick: bool) -> Iterator[dict[str, Any]]:
    yield from check_prefill("", 128, by_hand)
    for tokens in (8192,) if quick else (8192, 2048, 512):
        yield from measure_prefill(tokens, "", 128, by_hand)


PARTS = {"decode": decode_rows, "prefill": prefill_rows, "hopper": hopper_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and launches")
    parser.add_argument("--only", choices=list(PARTS))
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    rows = [{"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__}, copy_bandwidth()]
    for part, measure in PARTS.items():
        if arguments.only in (None, part):
            for row in measure(arguments.quick):
                say(json.dumps(row))
                rows.append(row)
    say("\n".join("  ".join(str(value) for value in row.values()) for row in rows))


if __name__ == "__main__":
    main()
