"""The attention kernels on a GPU: checked against float64, then timed, beside torch's own.

    python -m tests.bench.gpu_kernels [--sweep] [--only decode|prefill]

One JSON line a measurement, a table last. Decode is timed as an engine runs it: a CUDA graph over several layers' pages.
"""

import argparse
import itertools
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

from kernels import decode_attention as decode
from kernels import decode_pieces as cut
from kernels import prefill_attention as prefill
from tests.kernels.paged import error, filled, random

GPU = torch.device("cuda")
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
Timed = Callable[[], object]

DECODED = (
    (1, 200), (1, 2048), (1, 8192), (8, 200), (32, 200), (32, 2048), (64, 1024), (64, 4096), (128, 192), (256, 192), (512, 200),
)  # fmt: skip
PREFILLED = (512, 2048, 8192)


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


def graph_of(calls: list[Timed]) -> torch.cuda.CUDAGraph:
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def captured(calls: list[Timed]) -> float:
    """Seconds a call, of a CUDA graph of all of them."""
    return median(graph_of(calls).replay) / len(calls)


def decode_calls(rows: int, context: int, splits: cut.Splits, layers: int) -> list[Timed]:
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(rows * blocks, device=GPU).to(torch.int32).view(rows, blocks)
    lengths = torch.full((rows,), context, dtype=torch.int32, device=GPU)
    query = random(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    out = torch.empty_like(query)
    spare = decode.scratch(rows, HEADS, KV_HEADS, HEAD_DIM, GPU)
    shape = (rows * blocks, BLOCK_SIZE, 2 * KV_HEADS, HEAD_DIM)
    every = [torch.randn(shape, dtype=torch.bfloat16, device=GPU) for _ in range(layers)]

    pieces = cut.schedule(lengths, splits)

    def call(pages: Tensor) -> Timed:
        return lambda: decode.decode_attention(query, pages, tables, pieces, out, spare, SCALE, processors())

    return [call(pages) for pages in every]


def processors() -> int:
    return torch.cuda.get_device_properties(GPU).multi_processor_count


def measure_decode(rows: int, context: int, splits: cut.Splits) -> dict[str, Any]:
    """On pages of as many layers as do not stay in the cache."""
    size = rows * context * 2 * KV_HEADS * HEAD_DIM * 2
    layers = max(2, min(32, 2**30 // size))
    took = captured(decode_calls(rows, context, splits, layers))
    return {"what": "decode", "rows": rows, "context": context, "splits": f"{splits.tokens}x{splits.most}",
            "us": round(took * 1e6, 2), "tb_s": round(size / took / 1e12, 3)}  # fmt: skip


def check_decode() -> dict[str, Any]:
    lengths = [0, 1, 15, 16, 17, 255, 256, 257, 1021, 5000]
    pages, tables = filled(lengths, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.bfloat16, GPU)
    query = random(len(lengths), HEADS, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=GPU)
    wanted = decode.reference(query.double(), pages.double(), tables, on_device, SCALE)
    worst, same = 0.0, True
    for tokens in (64, 256, 1024):
        spare = decode.scratch(len(lengths), HEADS, KV_HEADS, HEAD_DIM, GPU)
        pieces = cut.schedule(on_device, cut.Splits(tokens, 16))
        outs = [torch.full_like(query, float("nan")) for _ in range(5)]
        for out in outs:
            decode.decode_attention(query, pages, tables, pieces, out, spare, SCALE, processors())
        worst = max(worst, *(error(out, wanted) for out in outs))
        same &= all(torch.equal(out, outs[0]) for out in outs)
    return {"what": "check decode", "error": worst, "repeats_equal": same, "ok": worst < 1e-2 and same}


def prefill_call(new: list[int], ends: list[int]) -> tuple[Timed, Tensor, Callable[[], Tensor]]:
    """The call, its output, and what that should be."""
    pages, tables = filled(ends, BLOCK_SIZE, KV_HEADS, HEAD_DIM, torch.bfloat16, GPU)
    query = random(sum(new), HEADS, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    out = torch.full_like(query, float("nan"))
    room = prefill.scratch(sum(ends) + 128 * len(ends), KV_HEADS, HEAD_DIM, query.dtype, GPU)
    work = prefill.plan(new, ends, room.tokens)

    def sent(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=GPU)

    firsts, last, tiles, starts = sent([0, *itertools.accumulate(new)]), sent(ends), sent(work.tiles), sent(work.starts)

    def call() -> Tensor:
        return prefill.prefill_attention(query, pages, tables, firsts, last, tiles, starts, work.groups, out, room, SCALE)

    return call, out, lambda: prefill.reference(query.double(), pages.double(), tables, firsts, last, SCALE)


def check_prefill() -> dict[str, Any]:
    call, out, wanted = prefill_call([300, 1, 0, 128, 77], [300, 97, 5, 128, 1000])
    call()
    found = error(out, wanted())
    return {"what": "check prefill", "error": found, "ok": found < 1e-2}


def measure_prefill(tokens: int) -> dict[str, Any]:
    call = prefill_call([tokens], [tokens])[0]
    begin = time.perf_counter()
    for _ in range(20):
        call()
    host = (time.perf_counter() - begin) / 20
    return {**prefill_row(tokens, "headrace", captured([call] * 4)), "host_us": round(host * 1e6, 1)}


def prefill_row(tokens: int, name: str, took: float) -> dict[str, Any]:
    work = 4 * HEADS * HEAD_DIM * tokens * tokens / 2
    return {
        "what": "prefill",
        "tokens": tokens,
        "by": name,
        "us": round(took * 1e6, 1),
        "tflop_s": round(work / took / 1e12, 1),
    }


def library(tokens: int) -> Iterator[dict[str, Any]]:
    query = random(1, HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device=GPU)
    key, value = (random(1, HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    for name, backend in (("torch cudnn", SDPBackend.CUDNN_ATTENTION), ("torch flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            call = partial(scaled_dot_product_attention, query, key, value, is_causal=True)
            yield prefill_row(tokens, name, captured([call] * 4))


def copy_bandwidth() -> dict[str, Any]:
    source = torch.randn(2**29, device=GPU)
    target = torch.empty_like(source)
    return {"what": "copy", "tb_s": round(2 * source.nbytes / median(lambda: target.copy_(source)) / 1e12, 3)}


def decode_rows(sweep: bool) -> Iterator[dict[str, Any]]:
    yield check_decode()
    for rows, context in DECODED:
        swept = [cut.Splits(tokens, 8 if rows > 48 else 16) for tokens in (64, 128, 256, 512, 1024, 2048)]
        for splits in [cut.splits_for(rows), *(swept if sweep else [])]:
            yield measure_decode(rows, context, splits)


def prefill_rows(sweep: bool) -> Iterator[dict[str, Any]]:
    yield check_prefill()
    for tokens in PREFILLED:
        yield measure_prefill(tokens)
        yield from library(tokens)


PARTS = {"decode": decode_rows, "prefill": prefill_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="every split of decode, not only what is chosen")
    parser.add_argument("--only", choices=list(PARTS))
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    rows = [{"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__}, copy_bandwidth()]
    for part, measure in PARTS.items():
        if arguments.only in (None, part):
            for row in measure(arguments.sweep):
                say(json.dumps(row))
                rows.append(row)
    say("\n".join("  ".join(str(value) for value in row.values()) for row in rows))


if __name__ == "__main__":
    main()
