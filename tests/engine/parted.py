"""Prompts of modules computed apart ("Prompt Cache", Gim et al. 2024): as an engine serves them, and as defined."""

from collections.abc import Sequence as Seq
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from services.engine.pages import Pages
from services.engine.parts import pack
from services.engine.plan import Device
from services.engine.schedule import Scheduler
from services.engine.sequence import Sequence
from shared.layout import Placement
from shared.messages import Sampling
from tests.engine import reference

Text = list[tuple[int, list[int]]]  # runs of tokens, each from its position on
ROOT = b"root of a tenant"


def sequence(
    name: str, parts: Seq[Text], rest: Text, count: int, n: int = 1, head: Seq[int] = (), block_size: int = 8
) -> Sequence:
    tokens = [*head, *(token for text in (*parts, rest) for _, ids in text for token in ids)]
    runs = tuple(tuple((position, len(ids)) for position, ids in text) for text in (*parts, rest))
    packed = pack(tokens, Placement(head=len(head), parts=runs[:-1], rest=runs[-1]), ROOT, block_size)
    return Sequence(
        request=name, choice=0, tokens=packed.tokens, prompt_length=len(tokens), limit=len(tokens) + count,
        sampling=Sampling(temperature=0.0, ignore_eos=True, n=n), hashes=packed.hashes, root=packed.root,
        parts=packed.parts, runs=packed.runs, unforked=n - 1,
    )  # fmt: skip


def serve(device: Device, scheduler: Scheduler, sequences: Seq[Sequence]) -> dict[tuple[str, int], list[int]]:
    """The output of each request's choices."""
    told: dict[tuple[str, int], list[int]] = {}
    for each in sequences:
        scheduler.add(each)
    while scheduler.busy:
        answers = device.run(scheduler.plan())
        for advanced, sampled in scheduler.commit(answers) if answers is not None else ():
            told.setdefault((advanced.request, advanced.choice), []).append(sampled.token)
    return told


def scheduler(device: Device, blocks: int, block_size: int = 8) -> Scheduler:
    limits = device.limits
    return Scheduler(Pages(blocks, block_size), limits.token_budget, limits.max_running, limits.prefill_budget)


def logits(config: dict[str, Any], tensors: dict[str, Tensor], parts: Seq[Text], rest: Text, head: Seq[int] = ()) -> Tensor:
    """[tokens, vocab] float64. A part's tokens see the head's, and those of their part that stand before them; the rest's see
    all of these.
    """
    parts = [[(0, list(head))], *parts]
    ids = [token for text in (*parts, rest) for _, run in text for token in run]
    positions = [position + at for text in (*parts, rest) for position, run in text for at in range(len(run))]
    whose = torch.tensor([at for at, text in enumerate((*parts, rest)) for _ in chain(*(run for _, run in text))])
    hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
    hidden |= (whose.unsqueeze(1) != whose) & (whose.unsqueeze(1) < len(parts)) & (whose > 0)
    return reference.logits(config, tensors, ids, positions, hidden)


def likeliest(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    parts: Seq[Text],
    rest: Text,
    output: list[int],
    head: Seq[int] = (),
) -> list[int]:
    """At each place of an output, what should stand there after all that stands before it."""
    first, ids = rest[-1]
    said = [*rest[:-1], (first, [*ids, *output[:-1]])]
    return logits(config, tensors, parts, said, head)[-len(output) :].argmax(1).tolist()
