"""The device against an independent float64 model: families, chunks, batches, working ahead, sampling's rules."""

from typing import Any

import numpy as np
import pytest
import torch

from kernels.matmul import matmul
from services.engine.apart import block_copies
from services.engine.plan import PENDING, Draw, Plan, Row
from shared.messages import Sampling
from tests.engine import reference
from tests.engine.conftest import Writer
from tests.engine.generate import answers, draw, generate
from tests.engine.gpu.conftest import Opener

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 96, 77)]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 1, "num_attention_heads": 6}),
}
EXACT = not torch.cuda.is_available()  # in bfloat16 a near tie may fall otherwise
EMPTY = Plan((), (), ())
# Padding computes nonsense that nobody reads; in the interpreter, numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def next_ids(config: dict[str, Any], tensors: dict[str, torch.Tensor], ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(reference.logits(config, tensors, ids)[-1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_reference(family: str, hub: Writer, open_gpu: Opener) -> None:
    name, changes = FAMILIES[family]
    config = reference.make_config(name, **changes)
    tensors = reference.make_tensors(config)
    gpu = open_gpu(hub(config, tensors))
    prompts = [IDS[:17], IDS[40:41], IDS[5:14]]
    tables = [[5, 9, 1, 7], [2, 3, 4, 6], [8, 10, 11, 12]]
    found = generate(gpu, prompts, tables, 8, 2)
    for prompt, got in zip(prompts, found, strict=True):
        wanted = next_ids(config, tensors, prompt, 2)
        assert got == wanted if EXACT else got[0] == wanted[0]


def test_warming_up_leaves_nothing_behind(hub: Writer, open_gpu: Opener) -> None:
    config = reference.make_config("LlamaForCausalLM")
    tensors = reference.make_tensors(config)
    gpu = open_gpu(hub(config, tensors))
    gpu.warm_up(20)
    assert generate(gpu, [IDS[:17]], [[5, 9, 1, 7]], 8, 1) == [next_ids(config, tensors, IDS[:17], 1)]


def test_warming_up_meets_every_tile(hub: Writer, open_gpu: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """In deterministic mode, every layer and the head have had every number of rows that has tiles of its own."""
    config = reference.make_config("LlamaForCausalLM")
    gpu = open_gpu(hub(config, reference.make_tensors(config)), deterministic=True)
    seen: set[tuple[int, int]] = set()

    def spy(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.add((len(x), len(weight)))
        return matmul(x, weight, *others)

    monkeypatch.setattr("services.engine.gpu.product.matmul", spy)
    monkeypatch.setattr("services.engine.gpu.device.TILED", [5, 7])
    gpu.warm_up(20)
    qkv, hidden, gate_up, vocab = 128, 64, 192, 96
    assert {(rows, columns) for rows in (5, 7) for columns in (qkv, hidden, gate_up, vocab)} <= seen


def test_cutting_and_company_change_nothing(hub: Writer, open_gpu: Opener) -> None:
    config = reference.make_config("LlamaForCausalLM")
    gpu, block_size = open_gpu(hub(config, reference.make_tensors(config))), 8
    prompts = [IDS[:1], IDS[3:14]]
    tables = [[1 + 6 * at + step for step in range(6)] for at in range(2)]
    together = generate(gpu, prompts, tables, block_size, 2, chunk=11)
    alone = [generate(gpu, [prompt], [list(range(20, 30))], block_size, 2)[0] for prompt in prompts]
    assert together == alone


def test_working_ahead(hub: Writer, open_gpu: Opener) -> None:
    """Each step's input is a token that the host has not seen; tables are told once; a stale row harms nobody."""
    config = reference.make_config("LlamaForCausalLM")
    tensors = reference.make_tensors(config)
    gpu = open_gpu(hub(config, tensors))
    prompt, blocks = IDS[:14], (3, 1, 2)
    assert gpu.run(Plan((Row(tuple(prompt), 0, blocks[:2], 5),), (draw(0, slot=5),), ())) is None
    told, got = 2, []
    for at in range(14, 17):
        need = -(-(at + 1) // 8)
        found = gpu.run(Plan((Row((PENDING,), at, blocks[:need], 5, told),), (draw(0, at - 13, slot=5),), ()))
        told = need
        assert found is not None
        got += [answer.token for answer in found]
    last = gpu.run(EMPTY)
    assert last is not None
    got += [answer.token for answer in last]
    assert got == next_ids(config, tensors, prompt, 4) or not EXACT
    assert gpu.run(Plan((Row(tuple(prompt), 0, blocks[:2], 0),), (draw(0, slot=0),), ())) is None
    [again] = gpu.run(EMPTY) or []
    assert again.token == got[0]


def drawn(row: int, slot: int, position: int, sampling: Sampling, prompt: list[int], output: list[int], stop: bool) -> Draw:
    return Draw(row, 0, position, sampling, tuple(prompt), tuple(output), stop, slot)


def test_edits_and_logprobs(hub: Writer, open_gpu: Opener) -> None:
    """Bias, masked stop ids and penalties move the choice; logprobs are of the raw logits."""
    config = reference.make_config("LlamaForCausalLM")
    tensors = reference.make_tensors(config)
    gpu = open_gpu(hub(config, tensors))
    logits = reference.logits(config, tensors, IDS[:9])[-1]
    first, second = (int(i) for i in logits.topk(2).indices)
    rows = (Row(tuple(IDS[:9]), 0, (1, 2), 0),)
    ways = [
        (Sampling(temperature=0.0, logit_bias=((7, 99.0),)), 7, True),
        (Sampling(temperature=0.0, min_tokens=3, stop_ids=(first,)), second, False),
        (Sampling(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=9.0), None, True),
        (Sampling(temperature=0.0, logprobs=3), first, True),
    ]
    plan = Plan(rows, tuple(drawn(0, at, 0, way, IDS[:9], [first] * 9, stop) for at, (way, _, stop) in enumerate(ways)), ())
    found = answers(gpu, plan)
    for answer, (_, wanted, _) in zip(found, ways, strict=True):
        assert answer.token == wanted if wanted is not None else answer.token != first
    assert found[0].logprob is None and found[3].logprob is not None
    own, top = found[3].logprob
    assert own == pytest.approx(float(logits.log_softmax(0)[first]), abs=1e-4 if EXACT else 0.1)
    assert len(top) == 3 and top[0][0] == first


def test_copies_come_first(hub: Writer, open_gpu: Opener) -> None:
    config = reference.make_config("LlamaForCausalLM")
    tensors = reference.make_tensors(config)
    gpu = open_gpu(hub(config, tensors))
    answers(gpu, Plan((Row(tuple(IDS[:12]), 0, (1, 2), 0),), (draw(0),), ()))
    rows = (Row((IDS[12],), 12, (1, 2), 0, 2), Row((IDS[50],), 12, (1, 3), 1))
    found = answers(gpu, Plan(rows, (draw(0), draw(1, slot=1)), tuple(block_copies(2, 3, 8))))
    for answer, ids in zip(found, (IDS[:13], [*IDS[:12], IDS[50]]), strict=True):
        assert answer.token == next_ids(config, tensors, ids, 1)[0] or not EXACT


def test_one_broken_row_is_marked_and_harms_no_other(hub: Writer, open_gpu: Opener) -> None:
    config = reference.make_config("LlamaForCausalLM")
    tensors = reference.make_tensors(config)
    tensors["model.embed_tokens.weight"][95] = torch.nan
    gpu = open_gpu(hub(config, tensors))
    rows = (Row(tuple(IDS[:5]), 0, (1,), 0), Row((95, 95, 95), 0, (2,), 1))
    found = answers(gpu, Plan(rows, (draw(1, slot=1), draw(0, slot=0)), ()))
    assert [answer.token for answer in found] == [-1, next_ids(config, tensors, IDS[:5], 1)[0]]


def test_deterministic_to_the_bit(hub: Writer, open_gpu: Opener) -> None:
    """The logits of a token are the same bits alone, in company, in chunks, and when another engine computes it again."""
    config = reference.make_config("LlamaForCausalLM")
    gpu = open_gpu(hub(config, reference.make_tensors(config)), deterministic=True)
    seen: list[torch.Tensor] = []
    head = gpu.model.parameters.head

    def spy(x: torch.Tensor) -> torch.Tensor:
        seen.append(head(x))
        return seen[-1]

    object.__setattr__(gpu.model.parameters, "head", spy)
    prompt, other = IDS[:19], Row(tuple(IDS[30:41]), 0, (6, 7), 1)
    whole = Row(tuple(prompt), 0, (1, 2, 3), 0)
    answers(gpu, Plan((whole,), (draw(0),), ()))
    answers(gpu, Plan((other, whole._replace(told=0)), (draw(0, slot=1), draw(1)), ()))
    answers(gpu, Plan((Row(tuple(prompt[:10]), 0, (4, 5), 2),), (), ()))
    answers(gpu, Plan((Row(tuple(prompt[10:18]), 10, (4, 5, 8), 2, 2),), (), ()))
    answers(gpu, Plan((Row((prompt[18],), 18, (4, 5, 8), 2, 3),), (draw(0, slot=2),), ()))
    alone, company, pieces = seen[0][0], seen[1][1], seen[2][0]
    if EXACT:  # the interpreter's products are numpy's, which promises no order
        torch.testing.assert_close(company, alone)
        torch.testing.assert_close(pieces, alone)
    else:
        assert torch.equal(company, alone)
        assert torch.equal(pieces, alone)


def test_kernel_by_kernel_is_as_one_graph(hub: Writer, open_gpu: Opener) -> None:
    """Decode rows with contexts beside chunks, as one padded graph, and, as larger steps are, without."""
    config = reference.make_config("LlamaForCausalLM", head_dim=64)
    tensors = reference.make_tensors(config)
    told: list[list[int]] = []
    for graphs in (False,) if EXACT else (True, False):  # the interpreter does the others' steps padded in any case
        gpu = open_gpu(hub(config, tensors))
        if not graphs:
            gpu.graphs.padded = lambda plan: None  # type: ignore[method-assign]
        prompts = [IDS[slot : slot + 12] for slot in range(3)]
        tables = [(1 + 2 * slot, 2 + 2 * slot) for slot in range(3)]
        for slot in range(3):
            answers(gpu, Plan((Row(tuple(prompts[slot]), 0, tables[slot], slot),), (), ()))
        while gpu.prepare():  # disturbs no context
            pass
        assert EXACT or gpu.graphs.missing() is None
        rows = [Row((IDS[slot],), 12, tables[slot], slot) for slot in range(3)]
        rows += [Row(tuple(IDS[20:31]), 0, (40, 41), 3), Row(tuple(IDS[50:57]), 0, (44,), 4)]
        found = answers(gpu, Plan(tuple(rows), tuple(draw(row, slot=row) for row in range(5)), ()))
        told.append([answer.token for answer in found])
    contexts = [[*prompts[slot], IDS[slot]] for slot in range(3)] + [IDS[20:31], IDS[50:57]]
    wanted = [next_ids(config, tensors, ids, 1)[0] for ids in contexts]
    for tokens in told:  # in bfloat16 a near tie may fall otherwise, but not two
        assert sum(a == b for a, b in zip(tokens, wanted, strict=True)) >= (5 if EXACT else 4)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_short_chunk_behind_a_long_one(graphs: bool, hub: Writer, open_gpu: Opener) -> None:
    """Its tokens attend as rows of their own: beside a decode row and a whole prompt, drawn from and not."""
    config = reference.make_config("LlamaForCausalLM", head_dim=64)
    tensors = reference.make_tensors(config)
    gpu = open_gpu(hub(config, tensors))
    if not graphs:
        gpu.graphs.padded = lambda plan: None  # type: ignore[method-assign]
    tables = ((1, 2, 3, 4, 5), (6, 7), (8, 9))
    answers(gpu, Plan((Row(tuple(IDS[:20]), 0, tables[0][:3], 0),), (), ()))
    answers(gpu, Plan((Row(tuple(IDS[50:62]), 0, tables[1], 1),), (), ()))
    short = Row(tuple(IDS[20:23]), 20, tables[0][:3], 0, 3)
    rows = (Row((IDS[62],), 12, tables[1], 1, 2), Row(tuple(IDS[30:41]), 0, tables[2], 2), short)
    found = [answer.token for answer in answers(gpu, Plan(rows, (draw(1, slot=2), draw(0, slot=1)), ()))]
    found += [answer.token for answer in answers(gpu, Plan((Row(tuple(IDS[23:30]), 23, tables[0][:4], 0, 3),), (draw(0),), ()))]
    wanted = [next_ids(config, tensors, ids, 1)[0] for ids in (IDS[30:41], IDS[50:63], IDS[:30])]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= (3 if EXACT else 2)
