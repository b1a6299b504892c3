"""The device side of an engine: a model and its pages; a plan in, sampled tokens out. Called from one thread."""

from pathlib import Path
from typing import Literal

import torch

from services.engine import batch, sample
from services.engine.attention import make_pages
from services.engine.checkpoint import open_checkpoint
from services.engine.linear import Dense
from services.engine.model import Llama
from services.engine.plan import Plan, Sampled
from services.engine.weights import load

Dtype = Literal["auto", "float32", "bfloat16"]


class Forward:
    """Raises BadModel when the model at `path` cannot be served."""

    def __init__(self, path: Path, dtype: Dtype, num_blocks: int, block_size: int) -> None:
        checkpoint = open_checkpoint(path)
        self.spec = checkpoint.spec
        self.blocks = num_blocks
        self.dtype_name = dtype
        kind = torch.float32 if dtype == "float32" else torch.bfloat16
        with torch.inference_mode():
            parameters = load(checkpoint, lambda m: Dense(m, kind), lambda m: Dense(m, kind), kind)
            self.model = Llama(self.spec, parameters)
            self.pages = make_pages(self.spec, num_blocks, block_size, kind)

    def run(self, plan: Plan) -> list[Sampled]:
        """Copies, then the forward, then one answer per draw, in order. A token of -1 says that its logits were not finite."""
        with torch.inference_mode():
            if plan.copies:
                self.pages.copy(plan.copies)
            if not plan.rows:
                return []
            step = batch.build(plan, self.pages.block_size, self.pages.null, self.pages.all.dtype)
            self.pages.begin(step.begun)
            logits = self.model(step, self.pages)
            return sample.sample(logits, step.draw_row, plan.draws)
