"""Small random models of each family against a plain reference, whole, in chunks, together, over any page size."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu import jit
from services.engine import batch
from services.engine.apart import block_copies
from services.engine.forward import Forward
from services.engine.plan import Plan, Row
from services.engine.spread import spread
from services.engine.weights import _every_head
from tests.engine import reference
from tests.engine.conftest import Writer
from tests.engine.generate import draw, generate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3}),
    "linear": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 1, "num_attention_heads": 6}),
}
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 96, 77)]


def all_logits(forward: Forward, ids: list[int], block_size: int) -> Tensor:
    """[tokens, vocab] of one whole prefill."""
    blocks = tuple(range(-(-len(ids) // block_size)))
    step = batch.build(
        Plan((Row(tuple(ids), 0, blocks),), (draw(0),), ()), block_size, forward.pages.null, forward.pages.all.dtype
    )
    with torch.inference_mode():
        return forward.model(dataclasses.replace(step, last=torch.arange(len(ids))), forward.pages)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, hub: Writer) -> None:
    name, changes = FAMILIES[family]
    config = reference.make_config(name, **changes)
    tensors = reference.make_tensors(config)
    forward = Forward(hub(config, tensors, shards=3 if family == "qwen2" else 1), "float32", 32, 8)
    expected = reference.logits(config, tensors, IDS)
    torch.testing.assert_close(all_logits(forward, IDS, 8).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("chunk", [1, 5, 33])
def test_cutting_changes_nothing(block_size: int, chunk: int, hub: Writer) -> None:
    config = reference.make_config("LlamaForCausalLM")
    forward = Forward(hub(config, reference.make_tensors(config)), "float32", 64, block_size)
    prompts = [IDS[:1], IDS[3:20], IDS[9:73], IDS[:16], IDS[40:]]
    blocks = list(range(64))
    random.Random(chunk).shuffle(blocks)
    tables = [blocks[i * 12 : i * 12 + 12] for i in range(5)]
    together = generate(forward, prompts, tables, block_size, 6, chunk)
    alone = [generate(forward, [p], [list(range(12))], block_size, 6)[0] for p in prompts]
    assert together == alone


@pytest.mark.skipif(not jit.available(), reason="no AVX2 here")
def test_a_short_chunk_behind_a_long_one(hub: Writer) -> None:
    """Its tokens attend as rows of their own: beside a decode row and a whole prompt, drawn from like them."""
    config = reference.make_config("LlamaForCausalLM", head_dim=32)
    tensors = reference.make_tensors(config)
    forward = Forward(hub(config, tensors), "bfloat16", 32, 8)
    assert forward.pages.native
    first, second, third = tuple(range(7)), (8, 9), (10, 11, 12)
    forward.run(Plan((Row(tuple(IDS[:43]), 0, first[:6]),), (draw(0),), ()))
    forward.run(Plan((Row(tuple(IDS[60:70]), 0, second),), (draw(0),), ()))
    rows = (Row((IDS[70],), 10, second), Row(tuple(IDS[20:38]), 0, third), Row(tuple(IDS[43:55]), 43, first))
    plan = Plan(rows, tuple(draw(row) for row in range(3)), ())
    wanted = torch.stack([reference.logits(config, tensors, ids)[-1] for ids in (IDS[60:71], IDS[20:38], IDS[:55])])
    for step in (plan, spread(plan, 64)):
        made = batch.build(step, 8, forward.pages.null, forward.pages.all.dtype)
        assert made.decodes == (1 if step is plan else 13)
        with torch.inference_mode():
            got = forward.model(made, forward.pages)[made.draw_row].double()
        assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_copies_come_first_and_are_independent(hub: Writer) -> None:
    config = reference.make_config("LlamaForCausalLM")
    forward = Forward(hub(config, reference.make_tensors(config)), "float32", 8, 8)
    forward.run(Plan((Row(tuple(IDS[:12]), 0, (0, 1)),), (draw(0),), ()))
    rows = (Row((IDS[12],), 12, (0, 1)), Row((IDS[50],), 12, (0, 2)))
    answers = forward.run(Plan(rows, (draw(0), draw(1)), tuple(block_copies(1, 2, 8))))
    for answer, ids in zip(answers, (IDS[:13], [*IDS[:12], IDS[50]]), strict=True):
        assert answer.token == int(all_logits(forward, ids, 8)[-1].argmax())


def test_what_a_block_held_before_is_forgotten(hub: Writer) -> None:
    config = reference.make_config("LlamaForCausalLM")
    forward = Forward(hub(config, reference.make_tensors(config)), "float32", 8, 8)
    prompts, tables = [IDS[:3], IDS[:19]], [[0], [1, 2, 3]]
    clean = generate(forward, prompts, tables, 8, 3)
    with torch.inference_mode():
        forward.pages.all[:, : forward.pages.null].fill_(torch.nan)
    assert generate(forward, prompts, tables, 8, 3) == clean


def test_one_broken_row_is_marked_and_harms_no_other(hub: Writer) -> None:
    config = reference.make_config("LlamaForCausalLM")
    tensors = reference.make_tensors(config)
    forward = Forward(hub(config, tensors), "float32", 8, 8)
    row, bad = Row(tuple(IDS[:5]), 0, (0,)), Row((95, 95, 95), 0, (1,))
    with torch.inference_mode():
        forward.model.parameters.embedding[95] = torch.nan
    answers = forward.run(Plan((row, bad), (draw(1), draw(0)), ()))
    assert [a.token for a in answers] == [-1, int(reference.logits(config, tensors, IDS[:5])[-1].argmax())]


def write_gguf(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], kind: gguf.GGMLQuantizationType) -> None:
    """As llama.cpp's converter writes a llama: q and k rows put in pairs, matrices quantized, vectors float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            pairs = torch.arange(config["head_dim"]).view(2, -1).t().flatten()
            tensor = tensor[_every_head(pairs, tensor.shape[0] // config["head_dim"])]
        written = names.get_name(name, try_suffixes=(".weight",))
        if tensor.dim() == 1:
            writer.add_tensor(written, tensor.numpy())
        else:
            writer.add_tensor(written, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    """The file's model is the reference on weights rounded as the file rounds them."""
    config = reference.make_config("LlamaForCausalLM")
    tensors, way = reference.make_tensors(config), gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "m.gguf", config, tensors, way)
    rounded = {
        name: t if t.dim() == 1 else torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(t.numpy(), way), way)))
        for name, t in tensors.items()
    }
    forward = Forward(tmp_path / "m.gguf", "float32", 16, 8)
    expected = reference.logits(config, rounded, IDS)
    torch.testing.assert_close(all_logits(forward, IDS, 8).double(), expected, rtol=1e-4, atol=1e-4)
    auto = all_logits(Forward(tmp_path / "m.gguf", "auto", 16, 8), IDS, 8).double()
    assert (auto - expected).norm() < 0.08 * expected.norm()
