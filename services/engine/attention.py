"""Paged attention in plain torch, and the pages it works on."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

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

    A block is zeroed when it is begun, so that what follows a row's end is finite: masked, but a NaN would get through.
    """

    def __init__(self, spec: ModelSpec, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        # Not zeroed as a whole: memory that no request has used yet costs nothing.
        self.all = torch.empty(spec.layers, blocks + 1, block_size, 2 * spec.kv_heads, spec.head_dim, dtype=dtype)
        self.all[:, blocks].zero_()
        self.layers = tuple(LayerPages(layer) for layer in self.all)
        self.null = blocks
        self.block_size = block_size

    def copy(self, copies: tuple[tuple[int, int], ...]) -> None:
        source, target = torch.tensor(copies).unbind(1)
        self.all[:, target] = self.all[:, source]

    def begin(self, blocks: Tensor) -> None:
        if len(blocks):
            self.all.index_fill_(1, blocks, 0)


def attention(query: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """[tokens, heads, head_dim] float32 -> the same in a float type; the pages hold the batch's own tokens already."""
    if not batch.chunks:
        return _decode(query, pages, batch)
    parts = [_prefill(query[chunk.first : chunk.last], pages, chunk) for chunk in batch.chunks]
    if batch.decodes:
        parts.insert(0, _decode(query[: batch.decodes], pages, batch))
    return torch.cat(parts)


def _decode(query: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """The query heads that share a key head stand as its queries, so nothing is repeated for grouped queries."""
    rows, heads, size = query.shape
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
