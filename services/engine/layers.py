"""All layers of a step in which every row decodes, in one call: no Python between the kernels, and no new memory.

Meanwhile the event loop has the interpreter, and tells the last step's tokens.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.cpu.decode import Shared, Step, task
from kernels.cpu.team import Program, Task
from services.engine.attention import LayerPages, Pages
from services.engine.choose import native_at
from services.engine.form import Form, gate
from services.engine.linear import Native
from services.engine.norm import Norm
from services.engine.spec import ModelSpec
from services.engine.weights import Layer


class Layers:
    """A program for each number of rows up to `most`, made when it comes. All of them use the same memory."""

    def __init__(self, spec: ModelSpec, layers: tuple[Layer[Norm], ...], pages: Pages, most: int) -> None:
        self.layers, self.pages, self.most = layers, pages, most
        heads, others = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
        self.memory = [torch.empty(most, size) for size in (spec.hidden, heads + others, heads, 2 * spec.intermediate)]
        self.shared = Shared()
        self.programs: dict[int, Program | None] = {}

    def program(self, rows: int) -> Program | None:
        """None where another form or a plain operation has a part in it."""
        if rows not in self.programs:
            forms = [form for layer in self.layers for form in (layer.qkv, layer.out, layer.gate_up, layer.down)]
            plain = all(layer.qkv_bias is None and layer.qk_norm is None for layer in self.layers)
            ours = plain and rows <= self.most and all(native_at(form, rows) for form in forms)
            self.programs[rows] = Program(list(self._tasks(rows))) if ours else None
        return self.programs[rows]

    def run(self, program: Program, x: Tensor, step: Step) -> Tensor:
        """x [rows, hidden] -> the residuals behind the last layer; they are good until the next call."""
        residuals = self.memory[0][: len(x)].copy_(x)
        ctypes.memmove(ctypes.addressof(self.shared), ctypes.addressof(step.shared), ctypes.sizeof(Shared))
        program.run()
        return residuals

    def _tasks(self, rows: int) -> Iterator[Task]:
        memory = [part[:rows] for part in self.memory]
        rooms = [
            _native(form, rows).weight.room(rows) for form in (self.layers[0].qkv, self.layers[0].out, self.layers[0].down)
        ]
        room = max(rooms, key=len)
        for layer, pages in zip(self.layers, self.pages.layers, strict=True):
            yield from self._layer(layer, pages, memory, room)

    def _layer(self, layer: Layer[Norm], pages: LayerPages, memory: list[Tensor], room: Tensor) -> Iterator[Task]:
        x, qkv, attended, gate_up = memory
        rows, heads = len(x), qkv.view(len(x), -1, self.pages.shape.head_dim)
        yield _native(layer.qkv, rows).task(x, qkv, room, layer.attention_norm)
        yield task(self.pages.shape, heads, pages.page, attended, self.shared)
        yield _native(layer.out, rows).task(attended, x, room, keep=True)
        yield _native(layer.gate_up, rows).task(x, gate_up, room, layer.mlp_norm)
        yield _native(layer.down, rows).task(gate_up, x, room, gate, keep=True)


def _native(form: Form, rows: int) -> Native:
    found = native_at(form, rows)
    assert found is not None
    return found
