# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a paged KV cache with plain PyTorch.

A cache is the 4-D view that vLLM binds to a layer, ``[blocks, kv_heads, block_size, content]``
with any strides; ``content`` is the key followed by the value of one token and head. A *slot* is
``block * block_size + offset``. Block 0 is vLLM's null block, which no request gets. Padding tokens
(slot -1) are written there, because filtering them out would need a host synchronisation.
"""

import torch


def _token_rows(cache: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return ``(rows, flat)``: ``[slots, kv_heads, content]`` if the strides allow it.

    Otherwise ``rows`` is ``[blocks, block_size, kv_heads, content]`` and ``flat`` is False.
    """
    by_token = cache.transpose(1, 2)
    if by_token.stride(0) == by_token.shape[1] * by_token.stride(1):
        return by_token.flatten(0, 1), True
    return by_token, False


def write_kv(
    cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store one key and value per token.

    Args:
        cache: ``[blocks, kv_heads, block_size, head_size + head_size_v]``, written in place.
        key: ``[tokens, kv_heads, head_size]``.
        value: ``[tokens, kv_heads, head_size_v]``.
        slots: ``[>= tokens]`` int64; negative entries are padding.
    """
    content = torch.cat((key, value), dim=-1).to(cache.dtype)
    slots = slots[: key.shape[0]].clamp(min=0)
    rows, flat = _token_rows(cache)
    if flat:
        rows.index_copy_(0, slots, content)
    else:
        block_size = cache.shape[2]
        rows[slots // block_size, slots % block_size] = content


def read_kv(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Gather tokens from a cache.

    Args:
        cache: as in ``write_kv``.
        slots: ``[requests, keys]`` int64, none negative.

    Returns:
        ``[requests, keys, kv_heads, content]`` in the cache's dtype.
    """
    rows, flat = _token_rows(cache)
    if flat:
        return rows.index_select(0, slots.flatten()).unflatten(0, slots.shape)
    block_size = cache.shape[2]
    return rows[slots // block_size, slots % block_size]
