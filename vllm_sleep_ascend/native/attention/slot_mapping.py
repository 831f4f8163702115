# SPDX-License-Identifier: Apache-2.0
"""Where each new token's key and value go: vLLM's slot mapping kernel in plain PyTorch."""

import torch


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    slot_mapping_ptr: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    PAD_ID: int,
    BLOCK_SIZE: int,
) -> None:
    """Write the cache slot of every token of a batch.

    The arguments are those of ``vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel``.
    Entries after the last token, and tokens that another context-parallel rank keeps, are
    ``PAD_ID``.

    Args:
        num_tokens: tokens in the batch.
        max_num_tokens: entries of the slot mapping to write.
        query_start_loc_ptr: ``[>= requests + 1]`` int32, ascending; first token of each request.
        positions_ptr: ``[>= num_tokens]`` int64, position of each token in its request.
        block_table_ptr: ``[requests, blocks]`` int32.
        block_table_stride: unused.
        slot_mapping_ptr: ``[>= max_num_tokens]`` int64, written in place.
        KV_CACHE_BLOCK_SIZE: tokens per block.
        TOTAL_CP_WORLD_SIZE: ranks that share a request's tokens.
        TOTAL_CP_RANK: this rank.
        CP_KV_CACHE_INTERLEAVE_SIZE: consecutive tokens that stay on one rank.
        PAD_ID: the value for "no slot".
        BLOCK_SIZE: unused (the Triton kernel's tile).
    """
    slot_mapping_ptr[num_tokens:max_num_tokens].fill_(PAD_ID)
    if num_tokens == 0:
        return
    # In int32, and without a search: an NPU has its AI CPU divide and add up int64, and search.
    positions = positions_ptr[:num_tokens].int()
    ends = query_start_loc_ptr[1:].clamp(max=num_tokens)
    ending = torch.zeros(num_tokens + 1, dtype=torch.int32, device=positions.device)
    ending.index_add_(0, ends, torch.ones_like(ends))
    requests = ending[:num_tokens].cumsum(0, dtype=torch.int32)
    requests.clamp_(max=block_table_ptr.shape[0] - 1)

    virtual_block = KV_CACHE_BLOCK_SIZE * TOTAL_CP_WORLD_SIZE
    blocks = block_table_ptr[requests, positions // virtual_block].long()
    offsets = positions % virtual_block
    if TOTAL_CP_WORLD_SIZE == 1:
        slots = blocks * KV_CACHE_BLOCK_SIZE + offsets
    else:
        stripe, place = (
            offsets // CP_KV_CACHE_INTERLEAVE_SIZE,
            offsets % CP_KV_CACHE_INTERLEAVE_SIZE,
        )
        local = stripe // TOTAL_CP_WORLD_SIZE * CP_KV_CACHE_INTERLEAVE_SIZE + place
        mine = stripe % TOTAL_CP_WORLD_SIZE == TOTAL_CP_RANK
        slots = torch.where(mine, blocks * KV_CACHE_BLOCK_SIZE + local, PAD_ID)
    slot_mapping_ptr[:num_tokens] = slots
