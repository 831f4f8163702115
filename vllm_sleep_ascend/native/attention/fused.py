# SPDX-License-Identifier: Apache-2.0
"""Attention by torch_npu's npu_fused_infer_attention_score: one launch for a layer and a step.

What it takes is in torch_npu's document of it, and its head sizes with layout TND in CANN's own
check (vllm-ascend #9632). What this module does not call it for is computed by ``paged``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch

from vllm_sleep_ascend.native.attention.kv_cache import Rows

_MASK = 2048  # rows and columns of the mask that sparse modes 3 and 4 take
_CAUSAL, _BAND = 3, 4  # sparse modes; both align the last query row with the last key
_NO_LIMIT = 2**31 - 1

MOST_KEYS = 262144
"""A request with one query row has at most this many."""


class Layout(Enum):
    """How the operator gets a batch's query rows."""

    TND = "TND"
    """One request after the other, each with as many as it likes."""
    BSH = "BSH"
    """One row of each request."""


@dataclass(frozen=True)
class Layer:
    """What decides whether, and how, the operator computes a layer."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    block_size: int
    scale: float
    window: int | None = None
    """As in ``paged.Rules``."""

    def layouts(self) -> Iterator[Layout]:
        """Those that are documented for the layer; the first one that works is used."""
        # With one row for each request, sparse modes are ignored: there is no window.
        if (
            self.dtype not in (torch.float16, torch.bfloat16)
            or self.head_size % 16
            or self.block_size % 16
            or max(self.heads, self.kv_heads) > 256
            or self.heads % self.kv_heads
            or self.heads // self.kv_heads > 64
            or self.kv_heads * self.head_size > 65535
        ):
            return
        if self.head_size in (64, 128, 192) and self.block_size <= 1024:
            yield Layout.TND
        if self.head_size <= 512 and self.block_size <= 512 and self.window is None:
            yield Layout.BSH


@dataclass(frozen=True)
class Batch:
    """A step's requests, with exact lengths, for all layers of a group."""

    ends: list[int]
    """Of each request's query rows."""
    lengths: list[int]
    """Keys of each request."""
    blocks_of_requests: torch.Tensor
    """``[requests, blocks]`` int32: vLLM's."""
    mask: torch.Tensor
    """See ``causal_mask``."""
    block_size: int

    def takes(self, layout: Layout, blocks: int) -> bool:
        """Whether the operator's document allows the batch, in a cache of so many blocks."""
        requests = len(self.ends)
        return (
            0 < requests <= (4096 if layout is Layout.TND else 65536)
            and self._blocks <= blocks
            and (self._decodes or layout is Layout.TND)
            and self._longest_decoding <= MOST_KEYS
        )

    def padded(self, requests: int) -> "Batch":
        """Of as many requests, which decode: those that are missing see the null block's first key.
        Its table is that of this one."""
        lengths = self.lengths + [1] * (requests - len(self.lengths))
        return replace(self, ends=list(range(1, requests + 1)), lengths=lengths)

    @cached_property
    def block_table(self) -> torch.Tensor:
        """The halves that hold a request's keys. Made by the first layer, so that a graph makes
        those of its steps."""
        return self.blocks_of_requests * 2

    @cached_property
    def _decodes(self) -> bool:
        """Whether each request has one query row."""
        return self.ends == list(range(1, len(self.ends) + 1))

    @cached_property
    def _blocks(self) -> int:
        """Blocks of keys, counted for each request that uses them."""
        return sum(-(-length // self.block_size) for length in self.lengths)

    @cached_property
    def _longest_decoding(self) -> int:
        """The most keys of a request with one query row."""
        starts = [0, *self.ends]
        rows = zip(starts, self.ends, self.lengths, strict=False)
        return max((length for start, end, length in rows if end - start == 1), default=0)


def causal_mask(device: torch.device) -> torch.Tensor:
    """True for keys after the query row: the operator moves it along sequences of any length."""
    return torch.ones(_MASK, _MASK, dtype=torch.bool).triu_(1).to(device)


def arguments(
    layer: Layer, layout: Layout, query: torch.Tensor, both: torch.Tensor, batch: Batch
) -> dict[str, Any]:
    """The operator's arguments, but for where its result goes.

    Args:
        layer: the layer.
        layout: one of its layouts.
        query: ``[tokens, heads, head_size]``.
        both: the cache's halves, ``[2 * blocks, block_size, kv_heads, head_size]``.
        batch: one that ``takes`` the layout.
    """
    # A value is in the half after its key's, so the key's number in the table leads to both.
    result = {
        "key": both[:-1].flatten(2),
        "value": both[1:].flatten(2),
        "block_table": batch.block_table,
        "block_size": layer.block_size,
        "num_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "scale": layer.scale,
        "input_layout": layout.value,
        "actual_seq_lengths_kv": batch.lengths,
    }
    if layout is Layout.BSH:
        return {**result, "query": _one_row_each(query)}
    return {
        **result,
        "query": query.contiguous(),
        "actual_seq_lengths": batch.ends,
        "atten_mask": batch.mask,
        "sparse_mode": _CAUSAL if layer.window is None else _BAND,
        "pre_tokens": _NO_LIMIT if layer.window is None else layer.window - 1,
        "next_tokens": _NO_LIMIT if layer.window is None else 0,
    }


def attend(
    layer: Layer,
    layout: Layout,
    query: torch.Tensor,
    both: torch.Tensor,
    output: torch.Tensor,
    batch: Batch,
    workspace: torch.Tensor | None = None,
) -> None:
    """Attend to a paged cache. The arguments are those of ``arguments``, and:

    Args:
        output: ``[tokens, heads, head_size]``, contiguous, written in place.
        workspace: the operator's; None to let it allocate its own.
    """
    if layout is Layout.BSH:
        output = output.view(len(output), 1, -1)  # never a copy
    torch.ops.npu.npu_fused_infer_attention_score.out(
        **arguments(layer, layout, query, both, batch),
        workspace=workspace,
        out=[output, torch.empty(1, dtype=torch.float32, device=output.device)],
    )


def workspace(
    layer: Layer, layout: Layout, query: torch.Tensor, both: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """For ``attend`` in a graph, whatever the lengths of later steps are."""
    get: Callable[..., torch.Tensor]
    get = torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace
    return get(**arguments(layer, layout, query, both, batch))


def _one_row_each(rows: torch.Tensor) -> torch.Tensor:
    """``[requests, 1, heads * size]``."""
    return rows.contiguous().flatten(1).unsqueeze(1)


def write(both: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> None:
    """Store one key and value per token, in one launch, as ``kv_cache.write_kv`` does."""
    of_keys = rows.of_keys[: key.shape[0]]
    torch.ops.atb._npu_reshape_and_cache(key, value, both[:-1], both[1:], of_keys)
