"""Paged attention in plain torch, and the pages it works on."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from kernels.cpu import jit
from kernels.cpu.decode import Step
from kernels.cpu.pages import Shape
from services.engine.batch import Batch, Chunk
from services.engine.spec import ModelSpec


class LayerPages:
    """One layer's keys and, behind them, its values: [blocks + 1, block_size, 2 * kv_heads, head_dim].

    Side by side, one call writes both and one call gathers both.
    """

    def __init__(self, page: Tensor) -> None:
        self.page = page
        self.slots = page.flatten(0, 1)
        self.kv_heads = page.shape[2] // 2

    def write(self, slots: Tensor, new: Tensor) -> None:
        """Put the new tokens' keys and values [tokens, 2 * kv_heads, head_dim] into their slots."""
        self.slots.index_copy_(0, slots, new.to(self.page.dtype))

    def read(self, blocks: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, length, head_dim] of the rows' blocks, rows * blocks-per-row in number."""
        found = self.page.index_select(0, blocks).view(rows, -1, *self.page.shape[2:])
        both = found[:, :length].transpose(1, 2)
        return both[:, : self.kv_heads], both[:, self.kv_heads :]


class Pages:
    """All keys and values: [layers, blocks + 1, block_size, 2 * kv_heads, head_dim]. The last block is the null block.

    Without our own kernel, which reads no further than a row's end, a block is zeroed when it is begun: what follows the end
    is masked, but a NaN would get through.
    """

    def __init__(self, spec: ModelSpec, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        # Not zeroed as a whole: memory that no request has used yet costs nothing.
        self.all = torch.empty(spec.layers, blocks + 1, block_size, 2 * spec.kv_heads, spec.head_dim, dtype=dtype)
        self.all[:, blocks].zero_()
        self.layers = tuple(LayerPages(layer) for layer in self.all)
        self.null = blocks
        self.block_size = block_size
        self.shape = Shape(spec.heads, spec.kv_heads, spec.head_dim, block_size)
        self.native = dtype == torch.bfloat16 and jit.available() and self.shape.fits

    def attention(self, batch: Batch, turn: Tensor) -> "Attention":
        return NativeAttention(batch, turn, self.shape) if self.native else Attention(batch, turn)

    def copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        source, target = torch.tensor(copies).unbind(1)
        slots = self.all.flatten(1, 2)
        slots[:, target] = slots[:, source]

    def begin(self, blocks: Tensor) -> None:
        if len(blocks) and not self.native:
            self.all.index_fill_(1, blocks, 0)


class Attention:
    """Attention of one step: made once, called for each layer. `heads` are queries, keys and values, in that order."""

    def __init__(self, batch: Batch, turn: Tensor) -> None:
        self.batch, self.turn = batch, turn

    def __call__(self, heads: Tensor, pages: LayerPages) -> Tensor:
        """[tokens, H + 2K, head_dim] float32, turned in place -> [tokens, H * head_dim]; the pages then hold the new tokens."""
        parts = [self.decodes(heads, pages)]
        queries = heads[:, : -2 * pages.kv_heads]
        parts += [_prefill(queries[chunk.first : chunk.last], pages, chunk).flatten(1) for chunk in self.batch.chunks]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def decodes(self, heads: Tensor, pages: LayerPages) -> Tensor:
        """Turn and put away all tokens, and attend for the decode rows."""
        rotate(heads[:, : -pages.kv_heads], self.turn)
        pages.write(self.batch.slots, heads[:, -2 * pages.kv_heads :])
        return _decode(heads[: self.batch.decodes, : -2 * pages.kv_heads], pages, self.batch).flatten(1)


class NativeAttention(Attention):
    """With our own kernel, which reads keys and values where they lie."""

    def __init__(self, batch: Batch, turn: Tensor, shape: Shape) -> None:
        super().__init__(batch, turn)
        angles = torch.view_as_real(turn).contiguous()
        self.step = Step(shape, angles, batch.slots, batch.tables, batch.places, batch.decodes, batch.longest)

    def decodes(self, heads: Tensor, pages: LayerPages) -> Tensor:
        return self.step(heads, pages.page)


def rotate(x: Tensor, turn: Tensor) -> None:
    """Rotary embedding in place: a pair of neighbours is a complex number. x is [T, heads, D] float32."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn)


def _decode(query: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """The query heads that share a key head stand as its queries, so nothing is repeated for grouped queries."""
    rows, heads, size = query.shape
    if not rows:
        return query
    keys, values = pages.read(batch.tables, rows, batch.longest)
    grouped = query.to(keys.dtype).view(rows, keys.shape[1], -1, size)  # [rows, kv_heads, heads per kv head, head_dim]
    mask = None if batch.mask is None else batch.mask.expand(-1, *grouped.shape[1:3], -1)
    return attend(grouped, keys, values, attn_mask=mask).reshape(rows, heads, size)


def _prefill(query: Tensor, pages: LayerPages, chunk: Chunk) -> Tensor:
    """In float32, whatever the pages hold: the library's kernel is half as fast in bfloat16."""
    keys, values = (page.float() for page in pages.read(chunk.blocks, 1, chunk.end))
    query = query.transpose(0, 1).unsqueeze(0)  # [1, heads, tokens, head_dim]
    causal = chunk.mask is None
    out = attend(query, keys, values, attn_mask=chunk.mask, is_causal=causal, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
