"""The real device: a GPU if there is one, else the CPU; the size of the page pool; the model. Imports torch."""

from pathlib import Path

import torch

from services.engine.checkpoint import open_checkpoint
from services.engine.forward import CPU, Forward
from services.engine.plan import Device
from services.engine.spec import BadModel, ModelSpec
from shared.config import ConfigError, EngineConfig
from shared.host import free_memory, usable_cores

POOL_SHARE = 0.15  # of the memory that is free: others, perhaps other engines, live here too
POOL_TOKENS = 32_768  # more than this a small machine would hardly use


def build(config: EngineConfig) -> Device:
    """Raises ConfigError with what to do."""
    gpu = _gpu(config.device)
    try:
        if gpu:
            from services.engine.gpu.build import build as build_gpu  # brings Triton, which a CPU need not have

            return build_gpu(config, gpu)
        return _build_cpu(config)
    except BadModel as error:
        raise ConfigError(str(error)) from error


def _gpu(wanted: str) -> str:
    """The GPU's name; empty for the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return ""
    number = int(wanted.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise ConfigError(f"HEADRACE_ENGINE_DEVICE={wanted}: this machine has {torch.cuda.device_count()} usable GPUs")
    return f"cuda:{number}"


def _build_cpu(config: EngineConfig) -> Device:
    if config.model_shape:
        raise ConfigError("HEADRACE_MODEL_SHAPE needs a GPU: random weights are for measuring one")
    torch.set_num_threads(config.threads or usable_cores())
    path = Path(config.model)
    blocks = _blocks(config, open_checkpoint(path).spec)
    limits = CPU.over(config.max_running, config.token_budget, config.prefill_budget)
    device = Forward(path, config.dtype, blocks, config.block_size, limits)
    device.warm_up()
    return device


def _blocks(config: EngineConfig, spec: ModelSpec) -> int:
    """Blocks of the page pool: at least one whole context, so that every request that is let in can run."""
    context = min(config.max_context or spec.max_positions, spec.max_positions)
    least = -(-context // config.block_size) + 1  # block 0 stays unused
    tokens = config.kv_tokens or max(context, min(POOL_TOKENS, _affordable(spec)))
    blocks = -(-tokens // config.block_size) + 1
    if blocks < least:
        raise ConfigError(
            f"HEADRACE_ENGINE_KV_TOKENS={tokens} is less than one context of {context}: lower HEADRACE_MAX_CONTEXT"
        )
    return blocks


def _affordable(spec: ModelSpec) -> int:
    per_token = 2 * 4 * spec.layers * spec.kv_heads * spec.head_dim  # keys and values, 4 bytes at most
    return int(POOL_SHARE * free_memory() / per_token)
