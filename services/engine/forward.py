"""The device side of an engine: a model and its pages; a plan in, sampled tokens out. Called from one thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from services.engine import batch, sample
from services.engine.attention import Pages
from services.engine.checkpoint import Checkpoint, open_checkpoint
from services.engine.choose import Best
from services.engine.ferry import HostFerry
from services.engine.form import Form
from services.engine.layers import Layers
from services.engine.linear import FORMS
from services.engine.matrix import Matrix
from services.engine.model import Llama
from services.engine.norm import Norm
from services.engine.plan import Draw, Limits, Plan, Row, Sampled
from services.engine.sample import Histories
from services.engine.spread import spread
from services.engine.weights import Maker, Makers, load
from shared import trace
from shared.messages import Sampling

CPU = Limits(max_running=64, token_budget=512, prefill_budget=512)
Dtype = Literal["auto", "float32", "bfloat16"]


def _makers(checkpoint: Checkpoint, dtype: Dtype) -> tuple[Maker, Maker]:
    """How to build the layers and the head. `auto` measures if the checkpoint is quantized, else it is bfloat16."""
    if dtype != "auto" or not checkpoint.quantized:
        plain = FORMS["bfloat16" if dtype == "auto" else dtype]
        return plain, plain
    return Best(("native", "int4", "bfloat16", "float32")), Best(("native", "float32"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Loading is thousands of short operations: beside other stages that start, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Forward:
    """Raises BadModel when the model at `path` cannot be served.

    `auto` and `bfloat16` keep embedding, keys and values in bfloat16; residuals, norms and logits are float32 in all.
    """

    def __init__(self, path: Path, dtype: Dtype, num_blocks: int, block_size: int, limits: Limits = CPU) -> None:
        checkpoint = open_checkpoint(path)
        self.spec = checkpoint.spec
        self.blocks = num_blocks
        self.limits = limits
        self.dtype_name = dtype
        self.threads = torch.get_num_threads()
        kind = torch.float32 if dtype == "float32" else torch.bfloat16
        make, make_head = _makers(checkpoint, dtype)

        def normed(matrix: Matrix, _: Tensor) -> Form:
            return make(matrix)

        with torch.inference_mode(), _one_thread():
            parameters = load(checkpoint, Makers(normed, normed, make, make_head, Norm, kind))
            self.pages = Pages(self.spec, num_blocks, block_size, kind)
            together = Layers(self.spec, parameters.layers, self.pages, limits.max_running) if self.pages.native else None
            self.model = Llama(self.spec, parameters, together)
        self.ferry = HostFerry(self.pages.all)
        best = [maker for maker in (make, make_head) if isinstance(maker, Best)]
        self.histories = Histories()
        self.forms = {shape: names for maker in best for shape, names in maker.chosen.items()}  # what `auto` chose

    def warm_up(self) -> None:
        """Run small and large steps once, on block 0, so that the first request does not pay for it."""
        size = self.pages.block_size
        draw = Draw(0, 0, 0, Sampling(temperature=0.0), (), (), True)
        for count in (1, size):
            self.run(Plan((Row((0,) * count, 0, (0,)),), (draw,), ()))

    def prepare(self) -> bool:
        return False

    def run(self, plan: Plan) -> list[Sampled]:
        """Copies, then the forward, then one answer per draw, in order. Token -1: the draw's logits were not finite."""
        with torch.inference_mode(), trace.span("device", "step", work=plan.work):
            if plan.copies:
                self.pages.copy(plan.copies)
            if not plan.rows:
                return []
            if self.pages.native:
                plan = spread(plan, self.limits.max_running)
            step = batch.build(plan, self.pages.block_size, self.pages.null, self.pages.all.dtype)
            self.pages.begin(step.begun)
            logits = self.model(step, self.pages)
            return sample.sample(logits, step.draw_row, plan.draws, self.histories) if plan.draws else []
