"""Where a decode step's time goes on a CPU, without the mesh: python -m tests.bench.cpu_steps [--rows 1 8 32]

Each row is a JSON line, medians in milliseconds: all layers as one program, each of its five kinds of task by itself, the head.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.cpu.team import Program
from services.engine import batch
from services.engine.forward import Forward
from services.engine.model import turns
from services.engine.plan import Plan, Row
from shared.config import bundled_model
from tests.engine.generate import draw

CONTEXT, BLOCKS, REPEAT = 100, 7, 25
KINDS = ("qkv", "attention", "out", "gate_up", "down")  # the tasks of a layer, in order


def median_ms(call: Callable[[], object]) -> float:
    took = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(took), 2)


def measure(forward: Forward, count: int) -> dict[str, object]:
    model, together = forward.model, forward.model.together
    assert together is not None, "our kernels do not run here"
    rows = tuple(Row((100 + at,), CONTEXT, tuple(range(1 + BLOCKS * at, 1 + BLOCKS * (at + 1)))) for at in range(count))
    plan = Plan(rows, tuple(draw(row) for row in range(count)), ())
    step = batch.build(plan, forward.pages.block_size, forward.pages.null, torch.bfloat16)
    attention = forward.pages.attention(step, turns(step.positions, model.parameters.frequencies))
    x, program = model.parameters.embedding[step.tokens].float(), together.program(count)
    assert program is not None
    together.run(program, x, attention.step)
    kinds = {kind: Program(program.tasks[at :: len(KINDS)]) for at, kind in enumerate(KINDS)}
    return {
        "rows": count, "layers": median_ms(program.run), **{kind: median_ms(part.run) for kind, part in kinds.items()},
        "head": median_ms(lambda: model.parameters.head(x, model.parameters.norm)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser("tests.bench.cpu_steps", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    given = parser.parse_args()
    forward = Forward(Path(bundled_model()), "auto", num_blocks=1024, block_size=16)
    forward.warm_up()
    with torch.inference_mode():
        for count in given.rows:
            sys.stdout.write(json.dumps(measure(forward, count)) + "\n")


if __name__ == "__main__":
    main()
