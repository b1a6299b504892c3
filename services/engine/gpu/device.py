"""The GPU side of an engine: a plan in, the tokens of the plan before it out. Called from one thread.

The host works one plan ahead: while the device computes step k, step k+1 is written, sent and started, its input being tokens
that nobody on the host has seen. All work goes to one stream, so plans run in order.
"""

from collections import deque

import torch
from torch import Tensor

from kernels.matmul import FASTEST
from services.engine.gpu.attend import Attention
from services.engine.gpu.draws import Answers, Draws
from services.engine.gpu.ferry import GpuFerry
from services.engine.gpu.graphs import Graphs
from services.engine.gpu.inputs import FEW_ROWS, Inputs, Step, Tables
from services.engine.gpu.llama import Llama
from services.engine.gpu.stopwatch import Stopwatch
from services.engine.gpu.transfer import Mark, Stream, send
from services.engine.plan import Draw, Limits, Plan, Row, Sampled
from services.engine.spec import ModelSpec
from services.engine.spread import spread
from shared.messages import Sampling

AHEAD = 1
HOST_S = 0.025  # what the host takes to start a prefill step kernel by kernel, and some more
GREEDY, EDITED = Sampling(temperature=0.0), Sampling(temperature=1.0, top_p=0.9, presence_penalty=1.0, logprobs=1)
DECODED = (1, 2, 4, 32, 48)  # rows: decode attention splits its work in several ways, a product of few rows is our own
TILED = [rows for rows, *_ in FASTEST[:-1]]  # with each of which an invariant product has other tiles
RATE = 600e12  # floating-point operations a second, about, of a GPU at matrix products


def graphed_tokens(spec: ModelSpec) -> int:
    """Up to so many tokens, the device finishes a step sooner than the host starts it kernel by kernel."""
    layer = spec.hidden * ((2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim + 3 * spec.intermediate)
    return max(64, int(HOST_S * RATE / (2 * spec.layers * layer)) // 64 * 64)


class Gpu:
    """`pages` [layers, blocks, block_size, 2 * kv_heads, head_dim]; block 0 takes what padding writes."""

    def __init__(self, model: Llama, pages: Tensor, attention: Attention, limits: Limits, context: int, room: int) -> None:
        device, self.block_size = pages.device, pages.shape[2]
        self.model, self.pages, self.attention = model, pages, attention
        self.limits, self.blocks = limits, pages.shape[1]
        self.stream = Stream(device)
        self.ferry = GpuFerry(pages, self.stream, "invariant" if attention.invariant else "")
        pack, invariant = attention.pack, attention.invariant
        self.inputs = Inputs(limits.max_running, limits.prefill_budget, room, AHEAD, device, pack, invariant)
        self.tables = Tables(limits.max_running, -(-context // self.block_size), device)
        self.draws = Draws(limits.max_running, model.spec.vocab_size, device)
        most = min(graphed_tokens(model.spec), limits.prefill_budget)
        self.graphs = Graphs(self._hidden, limits.max_running, most, pack, invariant)
        self.stopwatch = Stopwatch(device)
        self._flights: deque[Answers] = deque()

    def run(self, plan: Plan) -> list[Sampled] | None:
        """Token -1: the draw's logits were not finite."""
        with torch.inference_mode(), self.stream():
            if plan.rows:
                self._flights.append(self._start(plan))
                self.stopwatch.end(plan)
            if plan.rows and len(self._flights) <= AHEAD:
                return None
            answers = self._flights.popleft().read()
            if not plan.rows:
                self.stopwatch.drain()
            return answers

    def _start(self, plan: Plan) -> Answers:
        if not self.attention.invariant:
            plan = spread(plan, min(self.limits.max_running, FEW_ROWS[-1] - 1), self.attention.pack)
        if plan.copies:
            source, target = send(torch.tensor(plan.copies), self.pages.device).unbind(1)
            slots = self.pages.flatten(1, 2)
            slots[:, target] = slots[:, source]
        self.tables.update(plan.rows)
        padded = self.graphs.padded(plan)
        step = self.inputs.fill(plan, padded)
        self.stopwatch.begin()
        hidden = self._hidden(step) if padded is None else self.graphs.run(step)
        if not plan.draws:  # awaited all the same: what was sent for it must not be written over before
            return Answers(torch.empty(0), None, Mark(self.pages.device))
        distinct = len({draw.row for draw in plan.draws})
        return self.draws.draw(self.model.parameters.head(hidden[:distinct]), plan.draws)

    def _hidden(self, step: Step) -> Tensor:
        return self.model.hidden(self.inputs.arrays, step, self.tables, self.draws.newest, self.pages, self.attention)

    def warm_up(self, tokens: int) -> None:
        """Steps of every kind on block 0, the largest with so many tokens: no request waits for a kernel to be compiled."""
        blocks = (0,) * -(-tokens // self.block_size)
        decodes = [Row((0,), 0, blocks[:1], slot, 0) for slot in range(self.limits.max_running)]
        tiled = [count for count in TILED if count < tokens] if self.attention.invariant else []
        lengths = (tokens, tokens // 4, tokens - 1, 2, 2, *tiled)
        prefills = [Row((0,) * count, 0, blocks, len(decodes) - 1) for count in lengths]
        companies = (0, 0, 1, 1, min(FEW_ROWS[0], len(decodes) - 1), *[0] * len(tiled))
        for prefill, company in zip(prefills, companies, strict=True):
            self.run(Plan((*decodes[:company], prefill), (Draw(company, 0, 0, GREEDY, (), (), True),), ()))
        for count in [rows for rows in (*DECODED, *tiled) if rows < len(decodes)] + [len(decodes)]:
            draws = tuple(Draw(row, 0, 0, EDITED, (), (), True, row) for row in range(count))
            self.run(Plan(tuple(decodes[:count]), draws, ()))
        while self._flights:
            self.run(Plan((), (), ()))

    def prepare(self) -> bool:
        """Capture the graph that is missed most, from a step of padding alone, which computes nothing that is read."""
        step = self.graphs.missing()
        if step is None or self.pages.device.type != "cuda":
            return False
        with torch.inference_mode(), self.stream():
            self.inputs.clear()
            self.graphs.run(step)
        return True
