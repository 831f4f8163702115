# SPDX-License-Identifier: Apache-2.0
"""Paged attention, and writing to the cache."""

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from vllm_sleep_ascend.sim.npu.require import require

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
    name = "_npu_reshape_and_cache"
    require(slot_indices.dtype == torch.int32, name, f"slot_indices {slot_indices.dtype}")
    contiguous = key_cache.is_contiguous() and value_cache.is_contiguous()
    require(contiguous, name, "a cache is not contiguous")
    kept = slot_indices >= 0
    slots = slot_indices[kept].long()
    for paged, tokens in ((key_cache, key), (value_cache, value)):
        require(paged.dtype == tokens.dtype, name, f"{tokens.dtype} into {paged.dtype}")
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
    """softmax(scale * query @ key.T + mask) @ value for a batch of sequences.

    In layout TND, ``query`` is (tokens, heads, size); ``actual_seq_lengths`` holds the end of each
    sequence. Without ``block_table``, key and value have the query's layout, and their lengths are
    ends too. With it, they are (blocks, block size, heads * size), and lengths are per sequence.

    In layout BSH, ``query`` is (sequences, 1, heads * size), and there is a ``block_table``. The
    sparse mode is ignored.
    """
    given = [name for name, argument in unsupported.items() if argument not in (None, 0)]
    _require(not given, f"{', '.join(given)} is not simulated")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _require(tensor.is_contiguous(), f"{name} is not contiguous")
        _require(tensor.dtype in _types(), f"{name} is {tensor.dtype}, not one of {_types()}")
        _require(tensor.dim() == 3, f"{name} has {tensor.dim()} dimensions, not 3")
    _require(key.shape == value.shape, f"key {tuple(key.shape)} and value {tuple(value.shape)}")
    _require(actual_seq_lengths_kv is not None, "there is no actual_seq_lengths_kv")
    assert actual_seq_lengths_kv is not None
    kv_heads = num_key_value_heads or num_heads
    _require(num_heads % kv_heads == 0, f"{num_heads} heads over {kv_heads} heads of keys")
    _require(
        num_heads <= 256 and num_heads // kv_heads <= 64,
        f"{num_heads} heads over {kv_heads} of keys: more than 256, or 64 to 1",
    )
    if input_layout == "TND":
        ends = _ends(query, actual_seq_lengths, num_heads)
        _check_mask(sparse_mode, atten_mask)
    else:
        _require(input_layout == "BSH", f"input_layout {input_layout} is not simulated")
        _require(query.shape[1] == 1, f"BSH with {query.shape[1]} rows of queries is not simulated")
        _require(block_table is not None, "BSH without a block_table is not simulated")
        _require(atten_mask is None, "a mask with layout BSH is not simulated")
        ends, sparse_mode = list(range(1, len(query) + 1)), 0
    size = query.shape[1:].numel() // num_heads
    _require(
        size <= 512 and size % 16 == 0, f"heads of {size}, not a multiple of 16 of 512 at most"
    )
    _require(len(ends) == len(actual_seq_lengths_kv), "batch sizes differ")

    if block_table is None:
        sequences = _packed(key, value, actual_seq_lengths_kv)
    else:
        most = 1024 if input_layout == "TND" else 512
        _require(
            0 < block_size <= most and block_size % 16 == 0,
            f"blocks of {block_size}, not a multiple of 16 of {most} at most",
        )
        _require(key.shape[1] == block_size, f"blocks of {key.shape[1]}, not {block_size}")
        sequences = _paged(key, value, block_table, actual_seq_lengths_kv, block_size)
    rows = query.view(-1, num_heads, size)
    output = torch.empty_like(rows)
    lse = torch.empty(len(rows), num_heads, 1, dtype=torch.float32, device=query.device)
    begin = 0
    for end, (keys, values) in zip(ends, sequences, strict=True):
        if end == begin:
            continue
        q = rows[begin:end].float().transpose(0, 1)
        k = _per_query_head(keys, kv_heads, num_heads)
        v = _per_query_head(values, kv_heads, num_heads)
        hidden = _hidden(q.shape[1], k.shape[1], sparse_mode, pre_tokens, next_tokens)
        # What is hidden takes no part, whatever it holds.
        seen = (~hidden).any(0).nonzero().flatten()
        hidden, k, v = hidden[:, seen], k[:, seen], v[:, seen]
        scores = (q @ k.transpose(1, 2) * scale).masked_fill_(hidden, float("-inf"))
        sums = scores.logsumexp(-1, keepdim=True)
        output[begin:end] = ((scores - sums).exp() @ v).transpose(0, 1).to(output.dtype)
        lse[begin:end] = sums.transpose(0, 1)
        begin = end
    return output.view_as(query), lse if softmax_lse_flag else lse.new_zeros(1)


def _ends(query: torch.Tensor, ends: list[int] | None, num_heads: int) -> list[int]:
    """Of each sequence's rows, in layout TND."""
    _require(ends is not None, "layout TND needs actual_seq_lengths")
    assert ends is not None
    _require(0 < len(ends) <= 4096, f"{len(ends)} sequences, not 1 to 4096")
    _require(ends == sorted(ends) and ends[0] >= 0, "ends that do not ascend")
    _require(ends[-1] == len(query), "the last sequence does not end the query")
    _require(query.shape[1] == num_heads, f"{query.shape[1]} heads, not {num_heads}")
    size = query.shape[2]
    _require(size in (64, 128, 192) or _is_lax(), f"TND with heads of {size}, not 64, 128, 192")
    return ends


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


def _types() -> tuple[torch.dtype, ...]:
    """The types that NPU attention supports."""
    return (torch.float16, torch.bfloat16, *((torch.float32,) if _is_lax() else ()))


@cache
def _is_lax() -> bool:
    """NPU_SIM_LAX_ATTENTION=1 adds float32, and heads of other sizes: a small model's tokens can be
    compared with another implementation's without rounding differences."""
    return os.environ.get("NPU_SIM_LAX_ATTENTION") == "1"


def _require(condition: bool, problem: str) -> None:
    require(condition, "npu_fused_infer_attention_score", problem)


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
    assert mask is not None
    corners = mask.view(MASK, MASK)[:: MASK - 1, :: MASK - 1].tolist()
    _require(corners == [[0, 1], [0, 0]], "the mask does not hide what is above its diagonal")


def _packed(
    key: torch.Tensor, value: torch.Tensor, ends: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for begin, end in zip([0, *ends], ends, strict=False):
        yield key[begin:end], value[begin:end]


def _paged(
    key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, lengths: list[int], size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    _require(table.dtype == torch.int32, f"block_table is {table.dtype}, not int32")
    _require(table.dim() == 2, f"block_table has {table.dim()} dimensions, not 2")
    _require(len(table) >= len(lengths), f"{len(table)} rows of blocks, {len(lengths)} sequences")
    needed = [-(-length // size) for length in lengths]
    _require(max(needed) <= table.shape[1], f"{max(needed)} blocks in {table.shape[1]} columns")
    _require(sum(needed) <= len(key), f"{sum(needed)} blocks in use, of {len(key)}")
    for row, length in enumerate(lengths):
        blocks = table[row, : -(-length // size)].long()
        yield key[blocks].flatten(0, 1)[:length], value[blocks].flatten(0, 1)[:length]


def _per_query_head(tokens: torch.Tensor, kv_heads: int, heads: int) -> torch.Tensor:
    """(heads, tokens, size) in float32 from (tokens, …). Without tokens the output is 0."""
    size = tokens.shape[1:].numel() // kv_heads
    by_head = tokens.reshape(len(tokens), kv_heads, size).transpose(0, 1).float()
    return by_head.repeat_interleave(heads // kv_heads, 0)


def _hidden(queries: int, keys: int, mode: int, pre_tokens: int, next_tokens: int) -> torch.Tensor:
    """True for keys after the query (mode 3), or outside its band (mode 4), for none in mode 0. The
    last query is aligned with the last key."""
    if mode == 0:
        return torch.zeros(queries, keys, dtype=torch.bool)
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
