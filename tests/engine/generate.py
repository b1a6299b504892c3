"""Drives a device with hand-made plans: greedy continuation of several prompts, in chunks, over any block tables."""

from collections.abc import Sequence

from services.engine.plan import Device, Draw, Plan, Row, Sampled
from shared.messages import Sampling

GREEDY = Sampling(temperature=0.0)


def draw(row: int, position: int = 0, sampling: Sampling = GREEDY, slot: int = 0) -> Draw:
    return Draw(row, 0, position, sampling, (), (), True, slot)


def answers(device: Device, plan: Plan) -> list[Sampled]:
    """Those of this plan, from a device that may work ahead."""
    got = device.run(plan)
    if got is None:
        got = device.run(Plan((), (), ()))
    assert got is not None
    return got


def generate(
    forward: Device,
    prompts: Sequence[Sequence[int]],
    tables: Sequence[Sequence[int]],
    block_size: int,
    count: int,
    chunk: int = 1 << 20,
    computed: int = 0,
) -> list[list[int]]:
    """`count` greedy tokens for each prompt, all in the same steps; prompts are computed `chunk` tokens at a time,
    from `computed` on (less than all): those before are in the pages already.
    """
    total = [list(prompt) for prompt in prompts]
    done = [computed] * len(prompts)
    while any(len(t) < len(p) + count for t, p in zip(total, prompts, strict=True)):
        ends = [min(len(t), c + chunk) for t, c in zip(total, done, strict=True)]
        live = [i for i, t in enumerate(total) if len(t) < len(prompts[i]) + count]
        live.sort(key=lambda i: ends[i] - done[i] > 1)  # rows of one token first
        rows = tuple(
            Row(tuple(total[i][done[i] : ends[i]]), done[i], tuple(tables[i][: -(-ends[i] // block_size)]), i) for i in live
        )
        whole = [(row, i) for row, i in enumerate(live) if ends[i] == len(total[i])]
        found = answers(forward, Plan(rows, tuple(draw(row, slot=i) for row, i in whole), ()))
        for i in live:
            done[i] = ends[i]
        for (_, i), answer in zip(whole, found, strict=True):
            total[i].append(answer.token)
    return [t[len(p) :] for t, p in zip(total, prompts, strict=True)]
