# SPDX-License-Identifier: Apache-2.0
"""Replaces the Triton kernels of vLLM's V1 model runner by plain PyTorch."""

import sys
import warnings
from collections.abc import Callable

from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import register_kernels

from vllm_sleep_ascend.native import drafting, rejection
from vllm_sleep_ascend.native.attention.slot_mapping import compute_slot_mapping

_REJECTION = "vllm.v1.sample.rejection_sampler"
_DRAFTING = "vllm.v1.spec_decode.utils"

KERNELS: dict[str, Callable[..., None]] = {
    "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping,
    f"{_REJECTION}.rejection_greedy_sample_kernel": rejection.rejection_greedy_sample,
    f"{_REJECTION}.rejection_random_sample_kernel": rejection.rejection_random_sample,
    f"{_REJECTION}.expand_kernel": rejection.expand,
    f"{_REJECTION}.sample_recovered_tokens_kernel": rejection.sample_recovered_tokens,
    f"{_DRAFTING}.eagle_step_slot_mapping_metadata_kernel": (
        drafting.eagle_step_slot_mapping_metadata
    ),
    f"{_DRAFTING}.eagle_prepare_inputs_padded_kernel": drafting.eagle_prepare_inputs_padded,
    f"{_DRAFTING}.eagle_prepare_next_token_padded_kernel": drafting.eagle_prepare_next_token_padded,
    f"{_DRAFTING}.copy_and_expand_eagle_inputs_kernel": drafting.copy_and_expand_eagle_inputs,
}
"""Each replacement takes its kernel's keyword arguments."""

_done = False


def replace_triton_kernels() -> None:
    """Register the replacements. Calling it again does nothing."""
    global _done
    if _done:
        return
    _done = True
    with warnings.catch_warnings():
        # vLLM searches all modules for copies of a kernel, and so touches deprecated attributes.
        warnings.simplefilter("ignore", FutureWarning)
        register_kernels(KERNELS)
    if HAS_TRITON:
        # With Triton installed, vLLM uses its Triton top-k/top-p sampling on every accelerator.
        from vllm.v1.sample.ops import topk_topp_sampler

        plain = topk_topp_sampler.apply_top_k_top_p_pytorch
        topk_topp_sampler.apply_top_k_top_p_triton = (  # type: ignore[assignment]
            lambda logits, k, p, **_: plain(logits, k, p)  # vLLM 0.33 adds hints for its kernel
        )


def leave_triton_out_of_models() -> None:
    """Have models that choose between Triton and PyTorch at each call, such as Qwen3-VL, choose
    PyTorch. It reaches those whose modules have been imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.model_executor.models.") and "HAS_TRITON" in vars(module):
            module.HAS_TRITON = False  # type: ignore[attr-defined]
