# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding's rejection sampler: vLLM's four Triton kernels in plain PyTorch.

The functions take the same keyword arguments as the kernels in
``vllm.v1.sample.rejection_sampler``. The tokens of a batch are flattened, request by request;
``cu_num_draft_tokens_ptr`` is the cumulative count. R requests, T draft tokens, V vocabulary.
"""

import torch


def _grid(totals: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per request: number of drafts ``[R, 1]``, their flat indices ``[R, width]``, and a mask."""
    ends = totals.long().unsqueeze(1)
    starts = torch.cat((ends.new_zeros(1, 1), ends[:-1]))
    places = torch.arange(width, device=totals.device)
    return ends - starts, starts + places, places < ends - starts


def _write(
    output: torch.Tensor,
    totals: torch.Tensor,
    width: int,
    accepted: torch.Tensor,
    drafts: torch.Tensor,
    replacements: torch.Tensor,
    bonus: torch.Tensor,
    wanted: torch.Tensor | None,
) -> None:
    """Write the accepted drafts up to the first rejected one, then its replacement.

    Args:
        output: ``[R, width + 1]``; entries after the last token are left unchanged.
        totals: ``[R]``, cumulative number of draft tokens.
        width: the largest number of draft tokens of a request.
        accepted: ``[T]`` bool.
        drafts: ``[T]``, written where accepted.
        replacements: ``[T]``, written at the first rejected place.
        bonus: ``[R]``, written after the drafts if all are accepted.
        wanted: ``[R]`` bool, the requests to write; None for all.
    """
    counts, flat, exists = _grid(totals, width)
    places = torch.arange(width + 1, device=output.device)
    tokens = bonus.reshape(-1, 1).to(output.dtype).expand(-1, width + 1)
    if width and drafts.numel():
        flat = flat.clamp_(max=drafts.numel() - 1)
        kept = (accepted[flat] & exists).long().cumprod(dim=1).sum(dim=1, keepdim=True)
        drafted = torch.where(places[:-1] < kept, drafts[flat], replacements[flat])
        drafted = torch.where(exists, drafted.to(output.dtype), tokens[:, :width])
        tokens = torch.cat((drafted, tokens[:, :1]), dim=1)
    else:
        kept = torch.zeros_like(counts)
    written = places <= kept
    if wanted is not None:
        written = written & wanted.bool().unsqueeze(1)
    output.copy_(torch.where(written, tokens, output))


def rejection_greedy_sample(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    target_argmax_ptr: torch.Tensor,
    bonus_token_ids_ptr: torch.Tensor,
    is_greedy_ptr: torch.Tensor | None,
    max_spec_len: int,
    uniform_probs_ptr: torch.Tensor | None,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    SYNTHETIC_MODE: bool,
) -> None:
    """Accept drafts as long as they are the target's best token. Greedy requests only."""
    if SYNTHETIC_MODE:
        assert uniform_probs_ptr is not None and synthetic_conditional_rates_ptr is not None
        accepted = (draft_token_ids_ptr >= 0) & _synthetic(
            cu_num_draft_tokens_ptr, uniform_probs_ptr, synthetic_conditional_rates_ptr
        )
    else:
        accepted = draft_token_ids_ptr == target_argmax_ptr
    _write(
        output_token_ids_ptr,
        cu_num_draft_tokens_ptr,
        max_spec_len,
        accepted,
        draft_token_ids_ptr,
        target_argmax_ptr,
        bonus_token_ids_ptr,
        is_greedy_ptr,
    )


def rejection_random_sample(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    draft_probs_ptr: torch.Tensor | None,
    target_probs_ptr: torch.Tensor,
    bonus_token_ids_ptr: torch.Tensor,
    recovered_token_ids_ptr: torch.Tensor,
    uniform_probs_ptr: torch.Tensor,
    is_greedy_ptr: torch.Tensor,
    max_spec_len: int,
    vocab_size: int,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    NO_DRAFT_PROBS: bool,
    SYNTHETIC_MODE: bool,
) -> None:
    """Accept a draft with probability target / draft. Non-greedy requests only."""
    drafts = draft_token_ids_ptr.long()
    column = drafts.clamp(min=0).unsqueeze(1)
    if SYNTHETIC_MODE:
        assert synthetic_conditional_rates_ptr is not None
        likely = _synthetic(
            cu_num_draft_tokens_ptr, uniform_probs_ptr, synthetic_conditional_rates_ptr
        )
    else:
        target = target_probs_ptr.gather(1, column).squeeze(1)
        if NO_DRAFT_PROBS:
            likely = target >= uniform_probs_ptr
        else:
            assert draft_probs_ptr is not None
            draft = draft_probs_ptr.gather(1, column).squeeze(1)
            likely = (draft > 0) & (target / draft >= uniform_probs_ptr)
    _write(
        output_token_ids_ptr,
        cu_num_draft_tokens_ptr,
        max_spec_len,
        (drafts >= 0) & likely,
        draft_token_ids_ptr,
        recovered_token_ids_ptr,
        bonus_token_ids_ptr,
        ~is_greedy_ptr.bool(),
    )


def _synthetic(totals: torch.Tensor, uniform: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """``[T]``: accept each draft at random, at the rate of its position in the request."""
    tokens = torch.arange(uniform.numel(), device=uniform.device)
    requests = torch.searchsorted(totals.long(), tokens, right=True)
    starts = torch.cat((totals.new_zeros(1), totals[:-1])).long()
    return uniform < rates[tokens - starts[requests]]


def expand(
    output_ptr: torch.Tensor,
    input_ptr: torch.Tensor,
    cu_num_tokens_ptr: torch.Tensor,
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int,
) -> None:
    """Repeat each request's value ``[R]`` for each of its tokens ``[T]``."""
    values = torch.where(input_ptr == replace_from, replace_to, input_ptr).to(output_ptr.dtype)
    tokens = torch.arange(output_ptr.numel(), device=output_ptr.device)
    requests = torch.searchsorted(cu_num_tokens_ptr.long(), tokens, right=True)
    output_ptr.copy_(values[requests])


def sample_recovered_tokens(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    draft_probs_ptr: torch.Tensor | None,
    target_probs_ptr: torch.Tensor,
    inv_q_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    NO_DRAFT_PROBS: bool,
    USE_FP64_GUMBEL: bool,
) -> None:
    """Sample each draft's replacement ``[T]`` from ``max(target - draft, 0)``.

    ``inv_q_ptr`` is ``[R, V]``, inverse exponential noise; the argmax of the product is a sample.
    """
    if draft_token_ids_ptr.numel() == 0:
        return
    if NO_DRAFT_PROBS:
        left = target_probs_ptr.scatter(1, draft_token_ids_ptr.long().clamp(min=0).unsqueeze(1), 0)
    else:
        assert draft_probs_ptr is not None
        left = (target_probs_ptr - draft_probs_ptr).clamp_(min=0)
    tokens = torch.arange(draft_token_ids_ptr.numel(), device=inv_q_ptr.device)
    requests = torch.searchsorted(cu_num_draft_tokens_ptr.long(), tokens, right=True)
    best = (left * inv_q_ptr[requests]).argmax(dim=-1)
    output_token_ids_ptr.copy_(best.to(output_token_ids_ptr.dtype))
