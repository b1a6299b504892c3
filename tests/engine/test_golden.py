"""SmolLM2 at float32 says what was recorded, token by token, and says it however the work is cut up."""

import json
import random
from pathlib import Path

import pytest
import torch

from kernels.cpu import jit
from services.engine import batch, choose
from services.engine.forward import Forward
from services.engine.layers import Layers
from services.engine.plan import Plan, Row
from tests.engine.generate import draw, generate

RECORDS = json.loads((Path(__file__).parent.parent / "data" / "smollm2_greedy.json").read_text())
NEAR = 0.02  # logits closer than this may be told apart either way
NEAR_BFLOAT = 0.1  # the same where weights and activations are bfloat16


def tables(count: int, blocks: int = 40) -> list[list[int]]:
    return [list(range(i * blocks, (i + 1) * blocks)) for i in range(count)]


def check(got: list[int], record: dict[str, list[int]], near: float = NEAR) -> None:
    for token, expected, margin in zip(got, record["output_ids"], record["margins"], strict=False):
        if token != expected:
            assert margin < near
            return


def test_all_records_together(smollm2: Forward) -> None:
    longest = max(len(record["output_ids"]) for record in RECORDS)
    outputs = generate(smollm2, [r["prompt_ids"] for r in RECORDS], tables(len(RECORDS)), 16, longest)
    for output, record in zip(outputs, RECORDS, strict=True):
        check(output, record)


@pytest.mark.parametrize("chunk", [1 << 20, 7, 1])
def test_alone_and_in_chunks(smollm2: Forward, chunk: int) -> None:
    record = RECORDS[3]
    check(generate(smollm2, [record["prompt_ids"]], tables(1), 16, 16, chunk)[0], record)


def test_shuffled_blocks(smollm2: Forward) -> None:
    blocks = list(range(1024))
    random.Random(5).shuffle(blocks)
    shuffled = [blocks[i * 10 : i * 10 + 10] for i in range(4)]
    outputs = generate(smollm2, [r["prompt_ids"] for r in RECORDS[:4]], shuffled, 16, 12, chunk=16)
    for output, record in zip(outputs, RECORDS, strict=False):
        check(output, record)


@pytest.mark.skipif(not jit.available(), reason="no AVX2 here")
@pytest.mark.parametrize(("forms", "near"), [({"native"}, NEAR), ({"native", "bfloat16"}, NEAR_BFLOAT)])
def test_auto_says_the_same(forms: set[str], near: float, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our own kernels, word for word: prompts together, then decode rows together. Where bfloat16 has instructions of
    its own, it takes the prompts, and may turn what is nearly a tie."""
    possible = choose.possible
    monkeypatch.setattr(choose, "possible", lambda name, matrix: name in forms and possible(name, matrix))
    forward = Forward(smollm2_path, "auto", num_blocks=640, block_size=16)
    forward.warm_up()
    longest = max(len(record["output_ids"]) for record in RECORDS)
    outputs = generate(forward, [r["prompt_ids"] for r in RECORDS], tables(16), 16, longest)
    for output, record in zip(outputs, RECORDS, strict=True):
        check(output, record, near)
    assert torch.equal(*(decoded(forward, together) for together in (forward.model.together, None)))


def decoded(forward: Forward, together: Layers | None) -> torch.Tensor:
    """Logits of three decode rows that begin, fill and end a block, with all layers in one call or not."""
    rows = tuple(Row((100 + at,), at, tuple(range(1 + 3 * i, 2 + 3 * i + at // 16))) for i, at in enumerate((5, 16, 31)))
    step = batch.build(Plan(rows, tuple(draw(row) for row in range(3)), ()), 16, forward.pages.null, torch.bfloat16)
    forward.model.together = together
    with torch.inference_mode():
        forward.pages.all[:, :10].zero_()
        return forward.model(step, forward.pages).clone()


def test_auto_is_close_where_our_kernels_do_not_run(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit activations may turn a near tie, after which texts differ; most first tokens must be the recorded ones."""
    monkeypatch.setattr(jit, "available", lambda: False)
    forward = Forward(smollm2_path, "auto", num_blocks=256, block_size=16)
    forward.warm_up()
    assert not any("native" in names for names in forward.forms.values())
    outputs = generate(forward, [r["prompt_ids"] for r in RECORDS], tables(16, 16), 16, 2)
    assert sum(output[0] == r["output_ids"][0] for output, r in zip(outputs, RECORDS, strict=True)) >= 13
