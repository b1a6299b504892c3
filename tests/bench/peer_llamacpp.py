"""llama.cpp on the same GGUF and the same cores, as the peer of our CPU figures. A program, not a test.

    python tests/bench/peer_llamacpp.py MODEL.gguf --threads 2 --streams 1 8 32 --repeat 5

in an environment of its own that has `llama-cpp-python` (and numpy). It drives the C API directly: prompt tokens per
second (one prompt in one batch), and true batched decoding, where each `llama_decode` carries one token of each stream:
the best llama.cpp can do for N streams. The server that comes with llama-cpp-python takes one request at a time behind
a lock, so its concurrent figure is the one-stream figure; measure that one too, with our own load generator:

    python -m llama_cpp.server --model MODEL.gguf --n_threads 2 --n_threads_batch 2 --n_ctx 2048 \\
        --interrupt_requests false --port 8010
    python -m services.bench closed --url http://127.0.0.1:8010/v1 --text --users 8 --requests 16 --input-tokens 64

(`--interrupt_requests false`: by default a new request cuts the running stream short.)
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import llama_cpp as C
import numpy as np


@dataclass(frozen=True)
class Figure:
    what: str
    streams: int
    unified_cache: bool
    tokens_per_s: float  # median
    runs: list[float]
    others: list[float]  # share of the machine's cores that other processes took during each run: they lower a figure


class Peer:
    """One model in memory, and one context per measurement."""

    def __init__(self, path: str, threads: int) -> None:
        C.llama_log_set(_SILENT, None)
        C.llama_backend_init()
        params = C.llama_model_default_params()
        params.use_extra_bufts = False  # the weights' copies for AMX: version 0.3.36 crashes with them on some machines
        model = C.llama_model_load_from_file(path.encode(), params)
        if model is None:
            raise SystemExit(f"cannot load {path}")
        self.model, self.threads = model, threads
        self.vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))

    def context(self, tokens_each: int, streams: int, unified: bool, batch: int) -> Any:
        params = C.llama_context_default_params()
        params.n_ctx = -(-tokens_each // 256) * 256 * streams
        params.n_batch, params.n_ubatch = batch, min(batch, 512)
        params.n_seq_max, params.kv_unified = streams, unified
        params.n_threads = params.n_threads_batch = self.threads
        ctx = C.llama_init_from_model(self.model, params)
        if ctx is None:
            raise SystemExit("llama.cpp refused the context")
        return ctx


@C.llama_log_callback
def _SILENT(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """llama.cpp's own log would drown the figures."""


def decode(ctx: Any, rows: list[tuple[int, int, int, bool]]) -> None:
    """One `llama_decode` of (token, position, stream, logits wanted) rows."""
    batch = C.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for at, (token, position, stream, wanted) in enumerate(rows):
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, stream
    failed = C.llama_decode(ctx, batch)
    C.llama_batch_free(batch)
    if failed:
        raise SystemExit(f"llama_decode failed: {failed}")


def prompt_seconds(peer: Peer, ctx: Any, tokens: int, rng: np.random.Generator) -> float:
    """One prompt of random tokens in one batch, to its first logits."""
    C.llama_memory_clear(C.llama_get_memory(ctx), True)
    ids = rng.integers(100, peer.vocab, tokens).tolist()
    rows = [(token, at, 0, at == tokens - 1) for at, token in enumerate(ids)]
    start = time.perf_counter()
    decode(ctx, rows)
    C.llama_synchronize(ctx)
    return time.perf_counter() - start


def decode_seconds(peer: Peer, ctx: Any, streams: int, prompt: int, output: int, rng: np.random.Generator) -> float:
    """`output` greedy steps of all streams together, after their prompts (which are not counted)."""
    C.llama_memory_clear(C.llama_get_memory(ctx), True)
    for stream in range(streams):
        ids = rng.integers(100, peer.vocab, prompt).tolist()
        decode(ctx, [(token, at, stream, at == prompt - 1) for at, token in enumerate(ids)])
    tokens = rng.integers(100, peer.vocab, streams).tolist()
    start = time.perf_counter()
    for step in range(output):
        decode(ctx, [(token, prompt + step, stream, True) for stream, token in enumerate(tokens)])
        logits = np.ctypeslib.as_array(C.llama_get_logits(ctx), shape=(streams, peer.vocab))
        tokens = logits.argmax(axis=1).tolist()
    return time.perf_counter() - start


def busy() -> tuple[float, float]:
    """CPU seconds that the machine has worked, and that this process has."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, irq, soft, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK"), time.process_time()


def watched(work: Callable[[], float], tokens: int, repeat: int) -> tuple[list[float], list[float]]:
    """Rates of `repeat` runs, and what others took meanwhile."""
    rates, others = [], []
    for _ in range(repeat):
        (all_before, own_before), start = busy(), time.perf_counter()
        rates.append(round(tokens / work(), 1))
        (all_after, own_after), wall = busy(), time.perf_counter() - start
        foreign = (all_after - all_before) - (own_after - own_before)
        others.append(round(max(0.0, foreign) / wall / (os.cpu_count() or 1), 3))
    return rates, others


def prompts(peer: Peer, tokens: int, repeat: int) -> Figure:
    rng = np.random.default_rng(1)
    ctx = peer.context(tokens, 1, False, tokens)
    prompt_seconds(peer, ctx, tokens, rng)
    rates, others = watched(lambda: prompt_seconds(peer, ctx, tokens, rng), tokens, repeat)
    C.llama_free(ctx)
    return Figure(f"prompt of {tokens}", 1, False, statistics.median(rates), rates, others)


def streams(peer: Peer, count: int, unified: bool, prompt: int, output: int, repeat: int) -> Figure:
    rng = np.random.default_rng(2)
    ctx = peer.context(prompt + output, count, unified, 512)
    decode_seconds(peer, ctx, count, prompt, 4, rng)
    rates, others = watched(lambda: decode_seconds(peer, ctx, count, prompt, output, rng), count * output, repeat)
    C.llama_free(ctx)
    return Figure(f"decode {output} after {prompt}", count, unified, statistics.median(rates), rates, others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of the timed prompt")
    parser.add_argument("--context-tokens", type=int, default=64, help="prompt of each decoding stream")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    peer = Peer(args.model, args.threads)
    show(prompts(peer, args.prompt_tokens, args.repeat))
    for count in args.streams:
        # Two layouts of the cache: one pool for all streams, or one stripe each. Which is faster depends on the shape.
        for unified in (False, True) if count > 1 else (False,):
            show(streams(peer, count, unified, args.context_tokens, args.output_tokens, args.repeat))


def show(figure: Figure) -> None:
    sys.stdout.write(json.dumps(asdict(figure)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
