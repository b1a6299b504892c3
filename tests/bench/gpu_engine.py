"""What one GPU engine does without the mesh: decode steps, time to first token, throughput, and how long the GPU waits.

    python -m tests.bench.gpu_engine llama-3.1-8b [--quick] [--deterministic]

Each row is a JSON line. `step_ms` is the median time between the answers of decode steps, as the scheduler sees them;
`busy_ms` is the same step replayed back to back, so 1 - busy / step is how long the GPU waited between steps.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from triton import knobs

from services.engine.gpu.build import build
from services.engine.gpu.device import Gpu
from services.engine.pages import Pages
from services.engine.plan import Plan
from services.engine.schedule import Scheduler
from services.engine.sequence import Sequence
from shared.config import EngineConfig
from shared.messages import Sampling

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
CONTEXT = 9216
EMPTY = Plan((), (), ())


def sequences(count: int, given: int, wanted: int, seed: int) -> Iterator[Sequence]:
    ids = np.random.default_rng(seed).integers(1000, 30000, (count, given))
    for number, prompt in enumerate(ids.tolist()):
        yield Sequence(
            request=f"{seed}-{number}", choice=0, tokens=prompt, prompt_length=given, limit=given + wanted,
            sampling=GREEDY, hashes=[], root=bytes(16),
        )  # fmt: skip


class PrefillFirst(Scheduler):
    """What merge steps are compared with: while any prompt is to be computed, nobody decodes."""

    def _by_need(self) -> Iterator[tuple[Sequence, int]]:
        found = list(super()._by_need())
        yield from [pair for pair in found if pair[1] > 1] or found


def scheduler_of(gpu: Gpu, kind: type[Scheduler] = Scheduler, budget: int = 0) -> Scheduler:
    limits = gpu.limits
    pages = Pages(gpu.blocks, gpu.block_size)
    return kind(pages, budget or limits.token_budget, limits.max_running, limits.prefill_budget)


def serve(gpu: Gpu, count: int, given: int, wanted: int, seed: int) -> tuple[float, list[tuple[float, int]]]:
    """Seconds for all of them at once, and when each step was answered with how many tokens."""
    scheduler, answered = scheduler_of(gpu), []
    for sequence in sequences(count, given, wanted, seed):
        scheduler.add(sequence)
    started = time.perf_counter()
    while scheduler.busy:
        sampled = gpu.run(scheduler.plan())
        if sampled is not None:
            scheduler.commit(sampled)
            answered.append((time.perf_counter() - started, len(sampled)))
    return time.perf_counter() - started, answered


def decode(gpu: Gpu, rows: int) -> dict[str, object]:
    serve(gpu, rows, 128, 8, 0)
    _, answered = serve(gpu, rows, 128, 128, 1)
    steps = [b[0] - a[0] for a, b in pairwise(answered) if a[1] == b[1] == rows]
    wall, busy = 1000 * statistics.median(steps), replayed(gpu, rows)
    return {
        "what": "decode",
        "rows": rows,
        "step_ms": round(wall, 3),
        "busy_ms": round(busy, 3),
        "idle": round(1 - busy / wall, 3),
    }


def replayed(gpu: Gpu, rows: int, times: int = 30) -> float:
    """Milliseconds of the newest decode step, forward and sampling, started again and again without a pause."""
    size = next(size for size in gpu.graphs._rows if size >= rows)
    graph, output = gpu.graphs._graphs[gpu.graphs._decode_step(size)]
    with torch.inference_mode(), gpu.stream():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        graph.replay()
        begin.record()
        for _ in range(times):
            graph.replay()
            logits = gpu.model.parameters.head(output[:rows])
            logits.argmax(1)
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / times


def first_token(gpu: Gpu, given: int) -> dict[str, object]:
    serve(gpu, 1, given, 1, 0)
    took = statistics.median(serve(gpu, 1, given, 1, seed)[0] for seed in range(1, 8))
    return {"what": "ttft", "tokens": given, "ms": round(1000 * took, 2)}


def throughput(gpu: Gpu, count: int, given: int, wanted: int) -> dict[str, object]:
    took, _ = serve(gpu, count, given, wanted, 3)
    return {"what": "throughput", "requests": f"{count} x {given}/{wanted}", "tokens_s": round(count * wanted / took)}


def interrupted(gpu: Gpu, kind: type[Scheduler], budget: int) -> dict[str, object]:
    """32 streams decode; after 20 steps, 8 prompts of 4,096 tokens arrive. The gaps between the streams' tokens meanwhile."""
    scheduler, gaps, newest, steps = scheduler_of(gpu, kind, budget), [], {}, 0
    prefilled = 0.0
    for sequence in sequences(32, 128, 400, 5):
        scheduler.add(sequence)
    while scheduler.busy and not prefilled:
        sampled = gpu.run(scheduler.plan())
        advanced = scheduler.commit(sampled) if sampled is not None else []
        now, steps = time.perf_counter(), steps + 1
        for sequence, _ in advanced:
            if sequence.request.startswith("5-"):
                gaps += [now - newest[sequence.request]] if sequence.request in newest and steps > 20 else []
                newest[sequence.request] = now
        if steps == 20:
            arrived = now
            for sequence in sequences(8, 4096, 2, 6):
                scheduler.add(sequence)
        if steps > 20 and not any(sequence.prompt_length == 4096 for sequence in (*scheduler.running, *scheduler.waiting)):
            prefilled = now - arrived
    while scheduler.in_flight:
        scheduler.commit(gpu.run(EMPTY) or [])
    ms = sorted(1000 * gap for gap in gaps)
    return {
        "what": "streams while prompts arrive", "scheduling": kind.__name__, "budget": scheduler.token_budget,
        "gap_p50_ms": round(ms[len(ms) // 2], 1),
        "gap_p99_ms": round(ms[len(ms) * 99 // 100], 1), "gap_max_ms": round(ms[-1], 1),
        "prefill_tokens_s": round(8 * 4096 / prefilled),
    }  # fmt: skip


@contextmanager
def compiling() -> Iterator[list[str]]:
    """What is compiled, or read from the cache of what was, meanwhile."""
    seen: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **told: seen.append(told["fn"].name)
    yield seen
    knobs.runtime.jit_post_compile_hook = None


def say(row: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def measure(gpu: Gpu, shape: str, quick: bool) -> None:
    for rows in (1, 32, 128, 256):
        say(decode(gpu, rows))
    for tokens in (512, 2048, 8000 if "smol" in shape else 8192):
        say(first_token(gpu, tokens))
    for kind, budget in ((PrefillFirst, 8192), (Scheduler, 8192), (Scheduler, 2048), (Scheduler, 1024)):
        say(interrupted(gpu, kind, budget))
    say(throughput(gpu, 256, 128, 128))
    if not quick:
        say(throughput(gpu, 512, 512, 128))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--token-budget", type=int, default=0)
    given = parser.parse_args()
    started = time.perf_counter()
    config = EngineConfig(
        id="bench", model_shape=given.shape, max_context=min(CONTEXT, 8192 if "smol" in given.shape else CONTEXT),
        deterministic=given.deterministic, token_budget=given.token_budget,
    )  # fmt: skip
    gpu = build(config, "cuda:0")
    say({"what": "start", "seconds": round(time.perf_counter() - started, 1), "blocks": gpu.blocks})
    started = time.perf_counter()
    while gpu.prepare():
        pass
    say({"what": "prepared", "seconds": round(time.perf_counter() - started, 1), "graphs": len(gpu.graphs)})
    with compiling() as seen:
        measure(gpu, given.shape, given.quick)
    say({"what": "compiled while serving", "kernels": sorted(seen)})
    say({"what": "memory", "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)})


if __name__ == "__main__":
    main()
