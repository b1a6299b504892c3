"""Drives a Forward with hand-made plans: greedy continuation of several prompts, in chunks, over any block tables."""

from collections.abc import Sequence

from services.engine.forward import Forward
from services.engine.plan import Draw, Plan, Row
from shared.messages import Sampling

GREEDY = Sampling(temperature=0.0)


def draw(row: int, position: int = 0, sampling: Sampling = GREEDY) -> Draw:
    return Draw(row, 0, position, sampling, (), (), True)


def generate(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    tables: Sequence[Sequence[int]],
    block_size: int,
    count: int,
    chunk: int = 1 << 20,
) -> list[list[int]]:
    """`count` greedy tokens for each prompt, all in the same steps; prompts are computed `chunk` tokens at a time."""
    total = [list(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    while any(len(t) < len(p) + count for t, p in zip(total, prompts, strict=True)):
        ends = [min(len(t), c + chunk) for t, c in zip(total, computed, strict=True)]
        live = [i for i, t in enumerate(total) if len(t) < len(prompts[i]) + count]
        live.sort(key=lambda i: ends[i] - computed[i] > 1)  # rows of one token first
        rows = tuple(
            Row(tuple(total[i][computed[i] : ends[i]]), computed[i], tuple(tables[i][: -(-ends[i] // block_size)]))
            for i in live
        )
        whole = [(row, i) for row, i in enumerate(live) if ends[i] == len(total[i])]
        answers = forward.run(Plan(rows, tuple(draw(row) for row, _ in whole), ()))
        for i in live:
            computed[i] = ends[i]
        for (_, i), answer in zip(whole, answers, strict=True):
            total[i].append(answer.token)
    return [t[len(p) :] for t, p in zip(total, prompts, strict=True)]
