"""Where a decode step's time goes on a CPU, without the mesh: python -m tests.bench.cpu_steps [--rows 1 8 32] [--context 128]

Each row is a JSON line, medians in milliseconds: a whole step, its layers as one program, each of their five kinds of task by
itself, the head. The pages hold numbers, and rows' blocks lie as streams that grow together get them: memory that nobody has
written is one page of zeros, which any cache holds, and attention seemed four times as fast.
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

REPEAT = 25
KINDS = ("qkv", "attention", "out", "gate_up", "down")  # the tasks of a layer, in order


def median_ms(call: Callable[[], object]) -> float:
    took = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(took), 2)


def plan_of(count: int, context: int, block_size: int) -> Plan:
    blocks = context // block_size + 1
    tables = [tuple(1 + row + count * nth for nth in range(blocks)) for row in range(count)]
    rows = tuple(Row((100 + at,), context, table) for at, table in enumerate(tables))
    return Plan(rows, tuple(draw(row) for row in range(count)), ())


def measure(forward: Forward, count: int, context: int) -> dict[str, object]:
    model, together = forward.model, forward.model.together
    assert together is not None, "our kernels do not run here"
    plan = plan_of(count, context, forward.pages.block_size)
    whole = median_ms(lambda: forward.run(plan))  # before the others: the layers keep pointing at the last step's memory
    step = batch.build(plan, forward.pages.block_size, forward.pages.null, torch.bfloat16)
    attention = forward.pages.attention(step, turns(step.positions, model.parameters.frequencies))
    x, program = model.parameters.embedding[step.tokens].float(), together.program(count)
    assert program is not None
    together.run(program, x, attention.step)
    kinds = {kind: Program(program.tasks[at :: len(KINDS)]) for at, kind in enumerate(KINDS)}
    return {
        "rows": count, "step": whole, "layers": median_ms(program.run),
        **{kind: median_ms(part.run) for kind, part in kinds.items()},
        "head": median_ms(lambda: model.parameters.head(x, model.parameters.norm)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser("tests.bench.cpu_steps", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    given = parser.parse_args()
    forward = Forward(Path(bundled_model()), "auto", num_blocks=2048, block_size=16)
    forward.warm_up()
    with torch.inference_mode():
        forward.pages.all.normal_()
        for count in given.rows:
            sys.stdout.write(json.dumps(measure(forward, count, given.context)) + "\n")


if __name__ == "__main__":
    main()
