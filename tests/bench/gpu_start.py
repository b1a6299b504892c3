"""From the command to the first token, on a GPU: python -m tests.bench.gpu_start SHAPE FOLDER MODEL.gguf [--repeat 2]

Random weights of a named shape, served as they are made at start (dummy), and from a hub-style directory of four safetensors
files that this program writes into FOLDER first, so that they are in the page cache. MODEL.gguf lends its tokenizer.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save_file

from services.engine.spec import from_config
from services.engine.weights import Makers, build
from shared.shapes import SHAPES
from shared.vocab import load_vocab
from tests.mesh.harness import free_port

SHARDS = 4


class Names:
    """A source of parameters without contents, that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[int, ...]] = {}

    def has(self, name: str) -> bool:
        return name != "rope_factors"

    def matrix(self, name: str, *shape: int) -> torch.Tensor:
        self.asked[name] = shape
        return torch.empty(shape, device="meta")

    def vector(self, name: str, size: int) -> torch.Tensor:
        return self.matrix(name, size)


def names_and_shapes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    source, nothing = Names(), Makers(*[lambda *_: None] * 5, torch.bfloat16)
    build(from_config(SHAPES[shape]), source, nothing, paired=False)
    return sorted(source.asked.items())


def write(shape: str, folder: Path, lender: str) -> None:
    vocab = load_vocab(lender)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | {"torch_dtype": "bfloat16", "eos_token_id": 2}))
    (folder / "tokenizer.json").write_text(vocab.tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": vocab.eos}}))
    wanted = names_and_shapes(shape)
    files = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        mine = dict(wanted[shard::SHARDS])
        save_file(
            {name: torch.randn(size, device="cuda").mul_(0.02).bfloat16().cpu() for name, size in mine.items()}, folder / file
        )
        files |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def started(*model: str) -> dict[str, float]:
    """Seconds until the door says that it is ready, and until a request has been answered."""
    port, began = free_port(), time.perf_counter()
    command = [sys.executable, "-m", "services.up", "--port", str(port), *model]
    mesh = subprocess.Popen(command, env=os.environ | {"HEADRACE_MAX_CONTEXT": "9216"}, stderr=subprocess.DEVNULL)
    try:
        while not _ready(port):
            assert mesh.poll() is None, "the mesh ended"
            time.sleep(0.05)
        ready = time.perf_counter() - began
        body = json.dumps({"prompt": [1000, 1001, 1002], "max_tokens": 1, "ignore_eos": True}).encode()
        ask = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(ask, timeout=60).read()
        return {"ready_s": round(ready, 1), "answered_s": round(time.perf_counter() - began, 1)}
    finally:
        mesh.send_signal(signal.SIGINT)
        mesh.wait(30)


def _ready(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1).status == 200)
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser("tests.bench.gpu_start", description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=2)
    given = parser.parse_args()
    for number in range(given.repeat):
        say({"what": "dummy weights", "run": number, **started("--model", given.model, "--model-shape", given.shape)})
    began = time.perf_counter()
    write(given.shape, given.folder, given.model)
    say({"what": "written", "seconds": round(time.perf_counter() - began, 1)})
    for number in range(given.repeat):
        say({"what": "safetensors", "run": number, **started("--model", str(given.folder))})


def say(row: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
