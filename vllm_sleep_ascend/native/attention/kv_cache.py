# SPDX-License-Identifier: Apache-2.0
"""Where a token's key and value are in a paged KV cache; reading and writing them with PyTorch.

A cache is the 4-D view that vLLM binds to a layer, ``[blocks, kv_heads, block_size, content]``. Its
*pages*, one for each block, are contiguous, and only attention looks into them. A page has two
*halves*: the keys of the block's tokens, ``[block_size, kv_heads, head_size]``, then their values.
So keys and values are each what NPU operators call a paged cache: without a gap, a token's heads
side by side, twice as many blocks. Keys are in its even blocks, values in its odd ones.

A *row* is a token's place among all halves: ``2 * block * block_size + offset`` for its key, and
``block_size`` further on for its value. vLLM's *slot* is ``block * block_size + offset``. Block 0
is vLLM's null block, which no request gets. Padding tokens (slot -1) are written there, because
filtering them out would need a host synchronisation.
"""

from functools import cached_property

import torch


class Rows:
    """The rows that a step's tokens are written to: computed once for all layers of a group."""

    def __init__(self, slots: torch.Tensor, block_size: int) -> None:
        self.slots = slots
        self._block_size = block_size

    @cached_property
    def of_keys(self) -> torch.Tensor:
        """int32; negative for padding."""
        # In int32: an NPU divides int64 on its AI CPU.
        slots = self.slots.int()
        return torch.add(slots, slots // self._block_size, alpha=self._block_size)

    @cached_property
    def indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of keys and of values, int64; padding is in the null block."""
        keys = self.of_keys.clamp(min=0).long()
        return keys, keys + self._block_size


def halves(cache: torch.Tensor, head_size: int) -> torch.Tensor | None:
    """The cache as ``[2 * blocks, block_size, kv_heads, head_size]``, contiguous.

    None if there is no such view: values of another size than keys, or gaps between the pages.
    """
    blocks, kv_heads, block_size, content = cache.shape
    shape = (2 * blocks, block_size, kv_heads, head_size)
    if content != 2 * head_size or cache.stride(0) != cache[0].numel():
        return None
    return cache.as_strided(shape, _contiguous(shape))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, tokens, heads, size = shape
    return (tokens * heads * size, heads * size, size, 1)


def _keys_and_values(cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each ``[blocks, block_size, kv_heads, size]``, of any pages."""
    blocks, kv_heads, block_size, content = cache.shape
    pages = cache.as_strided((blocks, cache[0].numel()), (cache.stride(0), 1))
    end = block_size * kv_heads * head_size
    return (
        pages[:, :end].unflatten(1, (block_size, kv_heads, head_size)),
        pages[:, end:].unflatten(1, (block_size, kv_heads, content - head_size)),
    )


def write_kv(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> None:
    """Store one key and value per token.

    Args:
        cache: ``[blocks, kv_heads, block_size, head_size + head_size_v]``, written in place.
        key: ``[tokens, kv_heads, head_size]``.
        value: ``[tokens, kv_heads, head_size_v]``.
        rows: of as many tokens or more.
    """
    head_size = key.shape[-1]
    of_keys, of_values = (indices[: key.shape[0]] for indices in rows.indices)
    both = halves(cache, head_size)
    if both is not None:
        flat = both.flatten(0, 1)
        flat.index_copy_(0, of_keys, key.to(cache.dtype))
        flat.index_copy_(0, of_values, value.to(cache.dtype))
        return
    block, offset = _place(of_keys, cache)
    for side, tokens in zip(_keys_and_values(cache, head_size), (key, value), strict=True):
        side[block, offset] = tokens.to(cache.dtype)


def read_kv(
    cache: torch.Tensor, head_size: int, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather tokens from a cache.

    Args:
        cache: as in ``write_kv``.
        head_size: elements of a key.
        rows: of keys and of values, ``[2, requests, tokens]`` int64, none negative.

    Returns:
        Keys and values, ``[requests, kv_heads, tokens, size]`` in float32.
    """
    both = halves(cache, head_size)
    if both is not None:
        tokens = both.flatten(0, 1).index_select(0, rows.flatten())
        key, value = by_head(tokens.unflatten(0, rows.shape))
        return key, value
    block, offset = _place(rows[0], cache)
    keys, values = _keys_and_values(cache, head_size)
    return by_head(keys[block, offset]), by_head(values[block, offset])


def by_head(tokens: torch.Tensor) -> torch.Tensor:
    """From ``[..., tokens, heads, size]`` to ``[..., heads, tokens, size]`` in float32."""
    heads_first = tokens.transpose(-3, -2)
    return heads_first.to(torch.float32, memory_format=torch.contiguous_format)


def _place(of_keys: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The block and the place in it of tokens whose keys are in those rows."""
    rows, per_block = of_keys.int(), 2 * cache.shape[2]
    return (rows // per_block).long(), (rows % per_block).long()
