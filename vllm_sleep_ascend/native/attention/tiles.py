# SPDX-License-Identifier: Apache-2.0
"""Splits a batch of requests into rectangular tiles of attention work.

The requests of a batch differ in their number of new tokens (query rows) and of tokens in all
(keys). A tile is a box ``requests x query rows x keys`` that plain tensor operations compute at
once. Requests of similar shape share a tile, long prompts are split, and the scratch memory of a
tile is bounded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

SCRATCH_BYTES = 32 << 20
"""Float32 scratch for a tile's gathered keys and values, and the same again for its scores."""

PEAK_BYTES = 4 * SCRATCH_BYTES
"""The most memory that a tile may use, temporary copies included."""

_TILE_BYTES = 2048
"""Of a small tile's own tensors; torch_npu's allocator takes at least 512 for each."""

_FLOAT_BYTES = 4
_LEAST_CHUNK = 64


@dataclass(frozen=True)
class TilePlan:
    """The extent of a tile: its requests, query rows and number of keys."""

    requests: tuple[int, ...]
    first_row: int
    num_rows: int
    """Query rows per request. Shorter requests repeat their last row, which is not stored."""
    num_keys: int
    """Keys per request, from its first visible key; masked if a request has fewer."""


def step_bytes(tokens: int) -> int:
    """The most memory that the tiles of a step may use: of the largest, of what they keep for the
    step's layers, and of themselves if each has one token."""
    return PEAK_BYTES + SCRATCH_BYTES + tokens * _TILE_BYTES


@dataclass
class Kept:
    """What the tiles of a step keep for its layers, which then need not compute it anew. It is
    bounded for all of them together: they live as long as the step."""

    room: int = field(default_factory=lambda: SCRATCH_BYTES)
    """Bytes that are left."""

    def take(self, size: int) -> bool:
        """Whether so many bytes may be kept; if so, they are taken."""
        if size > self.room:
            return False
        self.room -= size
        return True


@dataclass
class Tile:
    """A tile's index tensors, on the device. R requests, Q query rows, S keys each."""

    rows: torch.Tensor
    """``[R, Q]`` int64: rows of the flat query."""
    positions: torch.Tensor
    """``[R, Q]`` int64: position of each query row in its request."""
    first_key: torch.Tensor
    """``[R, 1]`` int64: position of the first visible key."""
    last_key: torch.Tensor
    """``[R, 1]`` int64: position of the last key."""
    num_keys: int
    block_table: torch.Tensor
    """``[R, blocks]``."""
    stored: torch.Tensor | None
    """Flat indices into ``[R, Q]`` of the rows to store; None for all."""
    stored_rows: torch.Tensor
    """Rows of the flat query that these are written to."""
    kept: Kept = field(default_factory=Kept)
    """Shared by the tiles of a step."""
    chunks: dict = field(default_factory=dict)
    """Rows and masks, shared by the layers of a step."""


def keys_per_chunk(num_requests: int, kv_heads: int, content: int) -> int:
    """Keys per request that fit into the scratch memory (at least 64)."""
    return max(_LEAST_CHUNK, SCRATCH_BYTES // (_FLOAT_BYTES * num_requests * kv_heads * content))


def plan_tiles(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    content: int,
    causal: bool = True,
    window: int | None = None,
    wide: int = 0,
) -> Iterator[TilePlan]:
    """Split a batch into tiles.

    Args:
        query_lens: new tokens of each request; requests with none are skipped.
        seq_lens: total tokens of each request, or an upper bound.
        heads: query heads.
        kv_heads: key heads.
        content: elements of a key and its value together.
        causal: whether keys after the query row are hidden.
        window: visible keys of a query row, itself included; None for all.
        wide: elements of a query row, if it may take more memory than its scores.
    """
    score_budget = SCRATCH_BYTES // (_FLOAT_BYTES * heads)
    order = sorted(
        (r for r, n in enumerate(query_lens) if n > 0),
        key=lambda r: (query_lens[r].bit_length(), seq_lens[r]),
    )
    start = 0
    while start < len(order):
        # Requests of a group: query lengths within a power of two, keys that fit in one chunk.
        end = start + 1
        kind = query_lens[order[start]].bit_length()
        while end < len(order) and query_lens[order[end]].bit_length() == kind:
            keys, size = seq_lens[order[end]], end + 1 - start
            rows = max(query_lens[r] for r in order[start : end + 1])
            if (
                keys > keys_per_chunk(size, kv_heads, content)
                or rows * max(keys, wide) * size > score_budget
            ):
                break
            end += 1
        yield from _group_tiles(
            tuple(sorted(order[start:end])),
            query_lens,
            seq_lens,
            score_budget,
            causal,
            window,
            wide,
        )
        start = end


def _group_tiles(
    requests: tuple[int, ...],
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    score_budget: int,
    causal: bool,
    window: int | None,
    wide: int,
) -> Iterator[TilePlan]:
    rows = max(query_lens[r] for r in requests)
    keys = max(seq_lens[r] for r in requests)
    step = min(rows, max(1, score_budget // (max(keys, wide) * len(requests))))
    if causal and rows > 1:
        # Smaller steps skip more of the hidden half of the scores.
        step = min(step, 512)
    for first in range(0, rows, step):
        here = tuple(r for r in requests if query_lens[r] > first)
        num_rows = min(step, max(query_lens[r] for r in here) - first)
        num_keys = max(
            min(seq_lens[r], seq_lens[r] - query_lens[r] + first + num_rows)
            if causal
            else seq_lens[r]
            for r in here
        )
        if window is not None:
            sides = 1 if causal else 2
            num_keys = min(num_keys, num_rows + sides * (window - 1))
        yield TilePlan(here, first, num_rows, num_keys)


def make_decode_tiles(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_keys: int,
    kv_heads: int,
    content: int,
    window: int | None = None,
    wide: int = 0,
) -> list[Tile]:
    """The tiles of a batch with one query row per request. Neither their extent nor any work on
    the host depends on the lengths, so a captured graph can compute them anew in each replay.

    Args:
        seq_lens: ``[requests]``; 0 for padding, which sees the first slot of its first block.
        block_table: ``[requests, blocks]``.
        max_keys: the most tokens that a request may have.
        kv_heads: key heads.
        content: elements of a key and its value together.
        window: visible keys of a query row, itself included; None for all.
        wide: elements of all heads of a query row, if they may take more memory than its scores.
    """
    num_keys = max_keys if window is None else min(max_keys, window)
    tiles, kept = [], Kept()
    of_request = max(kv_heads * content * _LEAST_CHUNK, wide)
    most = max(1, SCRATCH_BYTES // (_FLOAT_BYTES * of_request))
    for first in range(0, len(seq_lens), most):
        lens = seq_lens[first : first + most].long().clamp(min=1).unsqueeze(1)
        table = block_table[first : first + most]
        rows = torch.arange(first, first + len(lens), device=lens.device)
        positions = lens - 1
        first_key = torch.zeros_like(lens) if window is None else (lens - window).clamp(min=0)
        tiles.append(
            Tile(
                *(rows.unsqueeze(1), positions, first_key, positions, num_keys, table),
                stored=None,
                stored_rows=rows,
                kept=kept,
            )
        )
    return tiles


def make_tile(
    plan: TilePlan,
    query_lens: Sequence[int],
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window: int | None = None,
    kept: Kept | None = None,
) -> Tile:
    """Build a plan's index tensors on the device of ``seq_lens``.

    Args:
        plan: from ``plan_tiles``.
        query_lens: as given to ``plan_tiles``.
        query_start: ``[requests + 1]``, first query row of each request.
        seq_lens: ``[requests]``, exact.
        block_table: ``[requests, blocks]``.
        window: as given to ``plan_tiles``.
        kept: of the step, if the plan is not all of it.
    """
    device = seq_lens.device
    num_requests = len(plan.requests)
    first = plan.requests[0]
    if plan.requests == tuple(range(first, first + num_requests)):
        # Without an index, whose copy from the host would wait for the device.
        after = first + num_requests
        start, end = query_start[first:after], query_start[first + 1 : after + 1]
        lens, table = seq_lens[first:after], block_table[first:after]
    else:
        index = torch.tensor(plan.requests, device=device)
        start, end = query_start[index], query_start[index + 1]
        lens, table = seq_lens[index], block_table[index]
    start, end, lens = (t.long().unsqueeze(1) for t in (start, end, lens))
    offsets = torch.arange(plan.first_row, plan.first_row + plan.num_rows, device=device)
    rows = torch.minimum(start + offsets, end - 1)
    positions = lens - end + rows
    counts = [min(plan.num_rows, query_lens[r] - plan.first_row) for r in plan.requests]
    stored = None
    stored_rows = rows.flatten()
    if min(counts) < plan.num_rows:
        flat = [i * plan.num_rows + j for i, count in enumerate(counts) for j in range(count)]
        stored = torch.tensor(flat, device=device)
        stored_rows = stored_rows[stored]
    first_key = torch.zeros_like(lens)
    if window is not None:
        first_key = (positions[:, :1] - window + 1).clamp(min=0)
    return Tile(
        *(rows, positions, first_key, lens - 1, plan.num_keys, table, stored, stored_rows),
        kept=kept or Kept(),
    )
