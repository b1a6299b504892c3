"""A hub-style directory through the whole mesh: sharded safetensors, tokenizer.json, a chat template of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from shared.config import bundled_model
from shared.vocab import load_vocab
from tests.engine.reference import logits, make_config, make_tensors
from tests.mesh.harness import RunningMesh, free_port
from tests.mesh.test_up import ended, up

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}[assistant]"


def write(folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A small random model with SmolLM2's vocabulary, in two shards."""
    vocab = load_vocab(bundled_model())
    config = make_config("LlamaForCausalLM", vocab_size=vocab.size, max_position_embeddings=256, eos_token_id=2) | changes
    tensors = make_tensors(config)
    names = sorted(tensors)
    files = {name: f"model-{at % 2 + 1:05}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(vocab.tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": {"content": vocab.eos}}))
    return config, tensors


async def test_a_directory_is_served(tmp_path: Path) -> None:
    config, tensors = write(tmp_path)
    async with RunningMesh(model=str(tmp_path), env={"HEADRACE_DTYPE": "float32"}) as mesh:
        prompt = load_vocab(str(tmp_path)).tokenizer.encode(f"[user] hi{load_vocab(str(tmp_path)).eos}[assistant]").ids
        body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6, "ignore_eos": True}
        status, reply = await mesh.post("/v1/chat/completions", body | {"return_token_ids": True, "model": tmp_path.name})
    assert status == 200, reply
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    ids = list(prompt)
    for id in reply["choices"][0]["token_ids"]:
        assert id == int(logits(config, tensors, ids)[-1].argmax())
        ids.append(id)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"), ({"num_hidden_layers": 9}, "model.layers.")],
)
async def test_a_model_that_cannot_be_served(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    async with up("--port", str(free_port()), "--model", str(tmp_path)) as process:
        code, _, err = await ended(process, 60)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
