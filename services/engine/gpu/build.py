"""From a configuration to a GPU that serves: weights straight to the device, and pages for what memory is left."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.silu_mul import TURN
from services.engine.checkpoint import open_checkpoint
from services.engine.gpu.attend import Attention
from services.engine.gpu.device import Gpu
from services.engine.gpu.gated import Gated
from services.engine.gpu.llama import Llama
from services.engine.gpu.product import Fixed, Product
from services.engine.gpu.tune import tune
from services.engine.matrix import Matrix, dense
from services.engine.plan import Limits
from services.engine.spec import BadModel, ModelSpec, from_config
from services.engine.weights import Makers, Parameters, Random, load
from services.engine.weights import build as assemble
from shared.config import ConfigError, EngineConfig
from shared.shapes import SHAPES

GPU = Limits(max_running=512, token_budget=2048, prefill_budget=8192)
TRIAL = 2  # blocks beyond those of the largest prefill, while the memory of a step is measured


def build(config: EngineConfig, name: str) -> Gpu:
    """Raises ConfigError, BadModel."""
    if config.dtype == "float32":
        raise ConfigError("HEADRACE_DTYPE=float32: a GPU serves bfloat16; use it, or HEADRACE_ENGINE_DEVICE=cpu")
    device = torch.device(name)
    torch.cuda.set_device(device)
    return open_device(config, device, GPU.over(config.max_running, config.token_budget, config.prefill_budget))


def open_device(config: EngineConfig, device: torch.device, limits: Limits) -> Gpu:
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    with torch.inference_mode():
        spec, parameters = _load(config, device, dtype)
        of_a_kind = zip(*((layer.qkv, layer.out, layer.gate_up, layer.down) for layer in parameters.layers), strict=True)
        tune((*of_a_kind, (parameters.head,)))
        context = min(config.max_context or spec.max_positions, spec.max_positions)
        model = Llama(spec, parameters, context)
        room = max(context, limits.prefill_budget)
        blocks = -(-context // config.block_size)
        attention = Attention(spec, limits.max_running, blocks, room, dtype, device, config.deterministic)

        def gpu_of(blocks: int) -> Gpu:
            shape = (spec.layers, blocks, config.block_size, 2 * spec.kv_heads, spec.head_dim)
            pages = torch.empty(shape, dtype=dtype, device=device)
            return Gpu(model, pages, attention, limits, context, room)

        largest = min(context - 1, limits.prefill_budget)
        return gpu_of(_blocks(config, spec, gpu_of, largest, device))


def _load(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> tuple[ModelSpec, Parameters[Tensor]]:
    if config.model_shape:
        spec = from_config(SHAPES[config.model_shape])
        return spec, assemble(spec, Random(device, dtype), makers_of(spec, dtype, config.deterministic), paired=True)
    checkpoint = open_checkpoint(Path(config.model), str(device))
    if checkpoint.spec.intermediate % TURN.value:
        raise BadModel(f"on a GPU, intermediate_size must be a multiple of {TURN.value}; use HEADRACE_ENGINE_DEVICE=cpu")
    return checkpoint.spec, load(checkpoint, makers_of(checkpoint.spec, dtype, config.deterministic))


def makers_of(spec: ModelSpec, dtype: torch.dtype, deterministic: bool = False) -> Makers[Tensor]:
    """A norm's weight goes into the matrix behind it, in float32, rounded once; llama.py has what is left of the norm."""
    form = Fixed if deterministic else Product

    def folded(matrix: Matrix, norm: Tensor) -> Tensor:
        return (dense(matrix) * norm).to(dtype)

    return Makers(
        qkv=lambda matrix, norm: form(folded(matrix, norm), dtype),
        gate_up=lambda matrix, norm: Gated(folded(matrix, norm), dtype, form, spec.rms_eps),
        adding=lambda matrix: form(dense(matrix).to(dtype), dtype, adds=True),
        head=lambda matrix: form(dense(matrix).to(dtype), torch.float32),  # near logits would be equal in bfloat16
        norm=lambda weight, _: weight.to(dtype),
        dtype=dtype,
    )


def _blocks(config: EngineConfig, spec: ModelSpec, gpu_of: Callable[[int], Gpu], largest: int, device: torch.device) -> int:
    """Blocks of the page pool, block 0 included: what the share leaves when the largest step has what it needs."""
    least = -(-(config.max_context or spec.max_positions) // config.block_size) + 1
    asked = -(-config.kv_tokens // config.block_size) + 1
    per_block = 2 * 2 * spec.layers * spec.kv_heads * spec.head_dim * config.block_size
    affordable = _left(config, gpu_of, largest, device) // per_block if device.type == "cuda" else asked
    blocks = min(asked, affordable) if config.kv_tokens else affordable
    if blocks < min(least, asked if config.kv_tokens else least):
        raise ConfigError(
            f"the GPU has room for {max(blocks - 1, 0) * config.block_size} tokens of KV, less than one context of "
            f"{(least - 1) * config.block_size}: lower HEADRACE_MAX_CONTEXT, or raise HEADRACE_ENGINE_GPU_SHARE"
        )
    return blocks


def _left(config: EngineConfig, gpu_of: Callable[[int], Gpu], largest: int, device: torch.device) -> int:
    """Bytes for pages: our share of the GPU's memory, less what we have taken and what steps take, by trial."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    trial = gpu_of(TRIAL + largest // config.block_size)
    if config.prefix_caches:
        trial.ferry.make_room()
    trial.warm_up(largest)
    step = torch.cuda.max_memory_allocated(device) - before - trial.pages.nbytes
    del trial
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(min(config.gpu_share * total - torch.cuda.memory_reserved(device), free) - step)
