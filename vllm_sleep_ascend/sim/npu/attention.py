# SPDX-License-Identifier: Apache-2.0
"""Paged attention, and writing to the cache."""

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

MASK = 2048
"""Rows and columns of the compressed mask for sparse modes 2 to 4."""


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    """Write each token's key and value, (tokens, heads, size), to its slot; negative slots are
    padding. The caches are (blocks, block size, heads, size)."""
    kept = slot_indices >= 0
    slots = slot_indices[kept].long()
    for paged, tokens in ((key_cache, key), (value_cache, value)):
        paged.view(-1, *paged.shape[2:])[slots] = tokens[kept]


def fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2**31 - 1,
    next_tokens: int = 2**31 - 1,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    **unsupported: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * query @ key.T + mask) @ value for a batch of sequences in layout TND.

    ``query`` is (tokens, heads, size); ``actual_seq_lengths`` holds the end of each sequence.
    Without ``block_table``, key and value have the query's layout, and their lengths are ends too.
    With it, they are (blocks, block size, heads * size), and the lengths are per sequence.
    """
    given = [name for name, argument in unsupported.items() if argument not in (None, 0)]
    _require(not given, f"{', '.join(given)} is not simulated")
    _require(input_layout == "TND", f"input_layout {input_layout} is not simulated, TND is")
    _require(
        actual_seq_lengths is not None and actual_seq_lengths_kv is not None,
        "layout TND needs actual_seq_lengths and actual_seq_lengths_kv",
    )
    assert actual_seq_lengths is not None and actual_seq_lengths_kv is not None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _require(tensor.is_contiguous(), f"{name} is not contiguous")
        _require(tensor.dtype in _types(), f"{name} is {tensor.dtype}, not one of {_types()}")
    _require(len(actual_seq_lengths) == len(actual_seq_lengths_kv), "batch sizes differ")
    _require(actual_seq_lengths[-1] == len(query), "the last sequence does not end the query")
    _check_mask(sparse_mode, atten_mask)
    kv_heads = num_key_value_heads or num_heads
    _require(num_heads % kv_heads == 0, f"{num_heads} heads over {kv_heads} heads of keys")

    if block_table is None:
        sequences = _packed(key, value, actual_seq_lengths_kv)
    else:
        _require(key.shape[1] == block_size, f"blocks of {key.shape[1]}, not {block_size}")
        sequences = _paged(key, value, block_table, actual_seq_lengths_kv, block_size)
    output = torch.empty_like(query)
    lse = torch.empty(len(query), num_heads, 1, dtype=torch.float32, device=query.device)
    begin = 0
    for end, (keys, values) in zip(actual_seq_lengths, sequences, strict=True):
        if end == begin:
            continue
        q = query[begin:end].float().transpose(0, 1)
        k = _per_query_head(keys, kv_heads, num_heads)
        v = _per_query_head(values, kv_heads, num_heads)
        scores = q @ k.transpose(1, 2) * scale
        if sparse_mode != 0:
            hidden = _hidden(q.shape[1], k.shape[1], sparse_mode, pre_tokens, next_tokens)
            scores.masked_fill_(hidden.to(scores.device), float("-inf"))
        sums = scores.logsumexp(-1, keepdim=True)
        output[begin:end] = ((scores - sums).exp() @ v).transpose(0, 1).to(output.dtype)
        lse[begin:end] = sums.transpose(0, 1)
        begin = end
    return output, lse if softmax_lse_flag else lse.new_zeros(1)


def fused_infer_attention_score_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    workspace: torch.Tensor | None = None,
    out: list[torch.Tensor],
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the output and the log-sum-exp into ``out``. Overwrites the workspace."""
    if workspace is not None:
        _require(workspace.nbytes >= _workspace_bytes(query), f"a workspace of {workspace.nbytes}")
        workspace.view(torch.uint8).fill_(0xFF)
    output, lse = fused_infer_attention_score(query, key, value, **arguments)
    _require(out[0].shape == output.shape and out[0].dtype == output.dtype, "out is unlike query")
    out[0].copy_(output)
    if arguments.get("softmax_lse_flag", False):
        out[1].copy_(lse)
    return out[0], out[1]


def fused_infer_attention_score_out_meta(
    *_: Any, out: list[torch.Tensor], **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return out[0], out[1]


def fused_infer_attention_score_get_max_workspace(
    query: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """A workspace for a call with these arguments, with one element for each byte needed."""
    return query.new_empty(_workspace_bytes(query))


def _workspace_bytes(query: torch.Tensor) -> int:
    """CANN's figure is not public. This is the size of the output in float32."""
    return max(512, 4 * query.numel())


@cache
def _types() -> tuple[torch.dtype, ...]:
    """The types that NPU attention supports. NPU_SIM_FLOAT32_ATTENTION=1 adds float32, so that
    tokens can be compared with another implementation without rounding differences."""
    extra = (torch.float32,) if os.environ.get("NPU_SIM_FLOAT32_ATTENTION") == "1" else ()
    return (torch.float16, torch.bfloat16, *extra)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise RuntimeError(f"npu_fused_infer_attention_score: {problem}")


def _check_mask(sparse_mode: int, mask: torch.Tensor | None) -> None:
    if sparse_mode == 0:
        _require(mask is None, "a mask with sparse_mode 0 is not simulated")
        return
    _require(sparse_mode in (3, 4), f"sparse_mode {sparse_mode} is not simulated")
    _require(
        mask is not None
        and mask.shape[-2:] == (MASK, MASK)
        and mask.dtype in (torch.bool, torch.int8, torch.uint8),
        f"sparse_mode {sparse_mode} needs a mask of {MASK} x {MASK}, bool, int8 or uint8",
    )


def _packed(
    key: torch.Tensor, value: torch.Tensor, ends: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for begin, end in zip([0, *ends], ends, strict=False):
        yield key[begin:end], value[begin:end]


def _paged(
    key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, lengths: list[int], size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    _require(table.dtype == torch.int32, f"block_table is {table.dtype}, not int32")
    for row, length in enumerate(lengths):
        blocks = table[row, : -(-length // size)].long()
        yield key[blocks].flatten(0, 1)[:length], value[blocks].flatten(0, 1)[:length]


def _per_query_head(tokens: torch.Tensor, kv_heads: int, heads: int) -> torch.Tensor:
    """(heads, tokens, size) in float32 from (tokens, …). Without tokens the output is 0."""
    size = tokens.shape[1:].numel() // kv_heads
    by_head = tokens.reshape(len(tokens), kv_heads, size).transpose(0, 1).float()
    return by_head.repeat_interleave(heads // kv_heads, 0)


def _hidden(queries: int, keys: int, mode: int, pre_tokens: int, next_tokens: int) -> torch.Tensor:
    """True for keys after the query (mode 3), or outside its band (mode 4). The last query is
    aligned with the last key."""
    distance = torch.arange(keys) - (torch.arange(queries) + keys - queries).unsqueeze(1)
    if mode == 3:
        return distance > 0
    return (distance > next_tokens) | (distance < -pre_tokens)


KERNELS = {
    "atb::_npu_reshape_and_cache": reshape_and_cache,
    "npu::npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu::npu_fused_infer_attention_score.out": fused_infer_attention_score_out,
}

METAS = {"npu::npu_fused_infer_attention_score.out": fused_infer_attention_score_out_meta}
"""Meta kernels that torch_npu lacks."""

ON_HOST = {
    "npu::_npu_fused_infer_attention_score_get_max_workspace": (
        fused_infer_attention_score_get_max_workspace
    )
}
"""Functions that run no kernel, and therefore are never captured."""
