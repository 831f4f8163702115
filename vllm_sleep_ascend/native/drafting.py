# SPDX-License-Identifier: Apache-2.0
"""Draft models: the proposer's four Triton kernels in plain PyTorch.

The functions take the same keyword arguments as the kernels in ``vllm.v1.spec_decode.utils``.
R is the number of requests. The tokens of a batch are flattened, request by request.
"""

import torch


def eagle_step_slot_mapping_metadata(
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    seq_lens_ptr: torch.Tensor,
    out_clamped_positions_ptr: torch.Tensor,
    out_slot_mapping_ptr: torch.Tensor,
    block_size: int,
    max_model_len: int,
    n_blocks_per_req: int,
    PAD_ID: int,
    batch_size: int,
) -> None:
    """Advance each request by one position, and compute the slot of its next key and value.

    A request at ``max_model_len`` wraps to position 0 and gets ``PAD_ID`` as its slot.
    """
    positions = positions_ptr[:batch_size].long() + 1
    beyond = positions >= max_model_len
    positions = positions.masked_fill(beyond, 0)
    columns = (positions // block_size).clamp_(max=n_blocks_per_req - 1).unsqueeze(1)
    blocks = block_table_ptr[:batch_size].long().gather(1, columns).squeeze(1)
    slots = (blocks * block_size + positions % block_size).masked_fill_(beyond, PAD_ID)
    lengths = (seq_lens_ptr[:batch_size] + 1).masked_fill_(beyond, 1).clamp_(max=max_model_len)
    out_clamped_positions_ptr[:batch_size] = positions
    out_slot_mapping_ptr[:batch_size] = slots
    out_slot_mapping_ptr[batch_size:] = PAD_ID
    seq_lens_ptr[:batch_size] = lengths


def eagle_prepare_inputs_padded(
    cu_num_draft_tokens_ptr: torch.Tensor,
    valid_sampled_tokens_count_ptr: torch.Tensor,
    query_start_loc_gpu_ptr: torch.Tensor,
    token_indices_to_sample_ptr: torch.Tensor,
    num_rejected_tokens_gpu_ptr: torch.Tensor,
    num_reqs: int,
) -> None:
    """Per request: the number of rejected drafts, and the index of the last accepted token."""
    totals = cu_num_draft_tokens_ptr[:num_reqs]
    drafts = totals.diff(prepend=totals.new_zeros(1))
    rejected = drafts + 1 - valid_sampled_tokens_count_ptr[:num_reqs]
    rejected = rejected.masked_fill(drafts <= 0, 0)
    ends = query_start_loc_gpu_ptr[1 : num_reqs + 1]
    token_indices_to_sample_ptr[:num_reqs] = ends - 1 - rejected
    num_rejected_tokens_gpu_ptr[:num_reqs] = rejected


def eagle_prepare_next_token_padded(
    sampled_token_ids_ptr: torch.Tensor,
    discard_request_mask_ptr: torch.Tensor,
    backup_next_token_ids_ptr: torch.Tensor,
    next_token_ids_ptr: torch.Tensor,
    valid_sampled_tokens_count_ptr: torch.Tensor,
    vocab_size: int,
    num_sampled_tokens_per_req: int,
    num_reqs: int,
    stride_sampled_token_ids: int,
    BLOCK_SIZE_TOKENS: int,
) -> None:
    """Per request: the number of valid tokens in ``[R, sampled]`` (invalid ones are -1), and the
    last valid one. Without one, or for a discarded request, the backup token is used."""
    tokens = sampled_token_ids_ptr[:num_reqs, :num_sampled_tokens_per_req]
    stands = (tokens != -1) & (tokens < vocab_size)
    stands &= ~discard_request_mask_ptr[:num_reqs].bool().unsqueeze(1)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(stands, places, -1).amax(dim=1)
    chosen = tokens.gather(1, last.clamp(min=0).unsqueeze(1)).squeeze(1)
    backup = backup_next_token_ids_ptr[:num_reqs].to(chosen.dtype)
    next_token_ids_ptr[:num_reqs] = torch.where(last >= 0, chosen, backup)
    valid_sampled_tokens_count_ptr[:num_reqs] = stands.sum(dim=1)


def copy_and_expand_eagle_inputs(
    target_token_ids_ptr: torch.Tensor,
    target_positions_ptr: torch.Tensor,
    next_token_ids_ptr: torch.Tensor,
    out_input_ids_ptr: torch.Tensor,
    out_positions_ptr: torch.Tensor,
    out_is_rejected_token_mask_ptr: torch.Tensor,
    out_is_masked_token_mask_ptr: torch.Tensor,
    out_new_token_indices_ptr: torch.Tensor,
    out_hidden_state_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    query_end_loc_ptr: torch.Tensor,
    padding_token_id: int,
    parallel_drafting_token_id: int,
    total_input_tokens: int,
    num_padding_slots_per_request: int,
    shift_input_ids: bool,
    BLOCK_SIZE_TOKENS: int,
) -> None:
    """Lay the target's tokens out for the draft model, with room for each request's new tokens.

    The outputs of a request are its accepted tokens (without the first, if shifted), the newly
    sampled token, placeholders for parallel drafting, and padding in place of rejected tokens.
    """
    extra, shift = num_padding_slots_per_request, int(shift_input_ids)
    starts, ends = query_start_loc_ptr.long(), query_end_loc_ptr.long()
    total = total_input_tokens + (extra - shift) * ends.numel()
    out_starts = starts + (extra - shift) * torch.arange(starts.numel(), device=starts.device)
    places = torch.arange(total, device=starts.device)
    request = torch.searchsorted(out_starts[1:].contiguous(), places, right=True)
    offsets = places - out_starts[request]
    kept = (ends - starts[:-1] + 1 - shift)[request]

    sources = (starts[request] + shift + offsets).clamp_(max=total_input_tokens - 1)
    tokens = target_token_ids_ptr[sources].to(out_input_ids_ptr.dtype)
    tokens = torch.where(offsets == kept, next_token_ids_ptr[request].to(tokens.dtype), tokens)
    drafted = (offsets > kept) & (offsets < kept + extra)
    rejected = offsets >= kept + extra
    tokens.masked_fill_(drafted, parallel_drafting_token_id)
    tokens.masked_fill_(rejected, padding_token_id)
    positions = target_positions_ptr[starts[:-1]][request] + offsets
    out_input_ids_ptr[:total] = tokens
    out_positions_ptr[:total] = positions.masked_fill_(rejected, 0)
    out_is_rejected_token_mask_ptr[:total] = rejected
    out_is_masked_token_mask_ptr[:total] = drafted

    new = (out_starts[:-1] + (ends - starts[:-1] + 1 - shift)).unsqueeze(1)
    new = new + torch.arange(extra, device=starts.device)
    out_new_token_indices_ptr[: new.numel()] = new.flatten()
    if shift_input_ids:
        inputs = torch.arange(total_input_tokens, device=starts.device)
        owner = torch.searchsorted(starts[1:].contiguous(), inputs, right=True)
        out_hidden_state_mapping_ptr[:] = inputs + (extra - shift) * owner
