# SPDX-License-Identifier: Apache-2.0
"""Attention over tiles, in float32, with plain PyTorch operations.

Scores are ``scale * q·k``, optionally capped (``cap * tanh(score / cap)``) and shifted by ALiBi
(``slope * (key - query)``); hidden keys get -inf. An attention sink is an extra logit per head that
takes weight and has no value. Keys are processed in chunks with a running maximum and sum
(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), so scratch memory does
not grow with the context. Only rows that hold a token of the request are read: the rest of a
block may hold anything, even NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_sleep_ascend.native.attention.kv_cache import by_head, read_kv
from vllm_sleep_ascend.native.attention.tiles import Tile, keys_per_chunk

ReadKV = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps rows, as ``rows_of`` gives them, to keys and values: ``[R, kv_heads, S, size]`` float32."""


@dataclass(frozen=True)
class Rules:
    """The parameters of a layer's attention."""

    scale: float
    head_size: int
    causal: bool = True
    window: int | None = None
    """Visible keys to the left of a query row, itself included (on both sides if not causal)."""
    soft_cap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    """``[heads]`` float32."""
    sinks: torch.Tensor | None = None
    """``[heads]``."""


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    tiles: list[Tile],
    rules: Rules,
) -> None:
    """Attend to a paged cache.

    Args:
        query: ``[tokens, heads, head_size]``.
        cache: see ``kv_cache``.
        output: ``[tokens, heads, head_size_v]``, written in place.
        tiles: cover every query row once.
        rules: the layer's attention.
    """
    kv_heads, block_size, content = cache.shape[1:]

    def rows_of(tile: Tile, positions: torch.Tensor) -> torch.Tensor:
        # In int32: an NPU divides int64 on its AI CPU.
        blocks = tile.block_table.gather(1, (positions.int() // block_size).long())
        rows = blocks.long() * (2 * block_size) + positions % block_size
        return torch.stack((rows, rows + block_size))

    def read(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return read_kv(cache, rules.head_size, rows)

    for tile in tiles:
        _attend((query,), output, tile, rules, kv_heads, content, rows_of, read)


def latent_attention(
    query: torch.Tensor | tuple[torch.Tensor, ...],
    cache: torch.Tensor,
    output: torch.Tensor,
    tiles: list[Tile],
    rules: Rules,
) -> None:
    """Attend to a paged cache of latents: one row for each token, which is the key of all heads,
    and whose first elements are their value.

    Args:
        query: ``[tokens, heads, head_size]``, or parts of it that are joined for one tile at a
            time.
        cache: ``[blocks, block_size, head_size]``, contiguous.
        output: ``[tokens, heads, value size]``, written in place.
        tiles: cover every query row once.
        rules: the layer's attention.
    """
    block_size, size_v = cache.shape[1], output.shape[2]
    tokens = cache.view(-1, rules.head_size)

    def rows_of(tile: Tile, positions: torch.Tensor) -> torch.Tensor:
        # In int32: an NPU divides int64 on its AI CPU.
        blocks = tile.block_table.gather(1, (positions.int() // block_size).long())
        return blocks.long() * block_size + positions % block_size

    def read(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = tokens.index_select(0, rows.flatten()).float()
        latents = latents.view(len(rows), 1, -1, rules.head_size)
        return latents, latents[..., :size_v]

    parts = query if isinstance(query, tuple) else (query,)
    for tile in tiles:
        _attend(parts, output, tile, rules, 1, rules.head_size, rows_of, read)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    tiles: list[Tile],
    rules: Rules,
) -> None:
    """Attend to the batch's own keys and values, without a cache (encoders).

    Args:
        query: ``[tokens, heads, head_size]``.
        key: ``[tokens, kv_heads, head_size]``.
        value: ``[tokens, kv_heads, head_size_v]``.
        output: ``[tokens, heads, head_size_v]``, written in place.
        tiles: cover every query row once; requests have no earlier tokens.
        rules: the layer's attention.
    """
    both = torch.cat((key, value), dim=-1)

    def rows_of(tile: Tile, positions: torch.Tensor) -> torch.Tensor:
        # Query rows and positions differ by a constant.
        return positions + (tile.rows[:, :1] - tile.positions[:, :1])

    def read(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv = by_head(both.index_select(0, rows.flatten()).unflatten(0, rows.shape))
        return kv[..., : rules.head_size], kv[..., rules.head_size :]

    for tile in tiles:
        _attend((query,), output, tile, rules, key.shape[1], both.shape[-1], rows_of, read)


def _attend(
    query: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    tile: Tile,
    rules: Rules,
    kv_heads: int,
    content: int,
    rows_of: Callable[[Tile, torch.Tensor], torch.Tensor],
    read: ReadKV,
) -> None:
    num_requests, num_rows = tile.rows.shape
    group = query[0].shape[1] // kv_heads
    taken = tile.rows.flatten()
    q = torch.cat([part.index_select(0, taken).float() for part in query], dim=-1).mul_(rules.scale)
    q = q.view(num_requests, num_rows, kv_heads, group, rules.head_size)
    # [R, kv_heads, group * Q, head_size]: the heads of a group share keys that are not repeated.
    q = q.permute(0, 2, 3, 1, 4).reshape(num_requests, kv_heads, group * num_rows, rules.head_size)

    step = keys_per_chunk(num_requests, kv_heads, content)
    running: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for first in range(0, tile.num_keys, step):
        count = min(step, tile.num_keys - first)
        rows, hidden, distance = _chunk(tile, rules, first, count, rows_of)
        key, value = read(rows)
        scores = torch.matmul(q, key.transpose(-1, -2))
        scores = scores.view(num_requests, kv_heads, group, num_rows, count)
        if rules.soft_cap:
            scores = scores.div_(rules.soft_cap).tanh_().mul_(rules.soft_cap)
        if distance is not None and rules.alibi_slopes is not None:
            scores += rules.alibi_slopes.view(1, kv_heads, group, 1, 1) * distance
        scores.masked_fill_(hidden, float("-inf"))
        if tile.num_keys == count and rules.sinks is None:
            weights = torch.softmax(scores, dim=-1).view(num_requests, kv_heads, -1, count)
            result = torch.matmul(weights, value)
            break
        if running is None:
            running = _start(scores, value, rules.sinks)
        running = _accumulate(running, scores, value)
    else:
        assert running is not None
        _, total, weighted = running
        result = (weighted / total).flatten(2, 3)

    result = result.view(num_requests, kv_heads, group, num_rows, -1).permute(0, 3, 1, 2, 4)
    result = result.reshape(num_requests * num_rows, kv_heads * group, -1)
    if tile.stored is not None:
        result = result.index_select(0, tile.stored)
    output.index_copy_(0, tile.stored_rows, result.to(output.dtype))


def _chunk(
    tile: Tile,
    rules: Rules,
    first: int,
    count: int,
    rows_of: Callable[[Tile, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of a chunk of keys ``[R, S]``: rows, and ``[R, 1, 1, Q, S]``: which are hidden, distances."""
    name = (first, count, rules.causal, rules.window, rules.alibi_slopes is not None)
    if name in tile.chunks:
        return tile.chunks[name]
    keys = tile.first_key + torch.arange(first, first + count, device=tile.rows.device)
    rows = rows_of(tile, torch.minimum(keys, tile.last_key))
    distance = (keys.unsqueeze(1) - tile.positions.unsqueeze(2))[:, None, None]
    # Keys past the end repeat the last key, and are hidden so that it counts once.
    hidden = (keys > tile.last_key)[:, None, None, None]
    if rules.causal:
        hidden = hidden | (distance > 0)
    if rules.window is not None:
        hidden = hidden | (distance <= -rules.window)
        if not rules.causal:
            hidden = hidden | (distance >= rules.window)
    chunk = (rows, hidden, distance if rules.alibi_slopes is not None else None)
    if tile.kept.take(sum(part.nbytes for part in chunk if part is not None)):
        tile.chunks[name] = chunk
    return chunk


def _start(
    scores: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The initial maximum, sum and weighted values: those of the sink, if there is one."""
    shape = (*scores.shape[:-1], 1)
    weighted = scores.new_zeros((*scores.shape[:-1], value.shape[-1]))
    if sinks is None:
        return scores.new_full(shape, float("-inf")), scores.new_zeros(shape), weighted
    maximum = sinks.float().view(1, *scores.shape[1:3], 1, 1).expand(shape)
    return maximum, scores.new_ones(shape), weighted


def _accumulate(
    running: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scores: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maximum, total, weighted = running
    new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
    # Without a visible key so far, the maximum is -inf: shift by 0, so that weights are exp(-inf).
    shift = new_maximum.masked_fill(new_maximum == float("-inf"), 0.0)
    weights = torch.exp(scores - shift)
    decay = torch.exp(maximum - shift)
    num_requests, kv_heads = weights.shape[:2]
    part = torch.matmul(weights.view(num_requests, kv_heads, -1, weights.shape[-1]), value)
    total = total * decay + weights.sum(dim=-1, keepdim=True)
    return new_maximum, total, weighted * decay + part.view_as(weighted)
