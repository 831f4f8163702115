# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (DeepSeek-V2, V3) as vLLM's attention interface has it, in PyTorch.

The cache has one row for each token: its latent, from which a layer's ``kv_b_proj`` makes the keys
and values of all heads, and the rotated part of the keys, which heads share. vLLM's layer absorbs
that matrix: it multiplies queries by the part for keys, and what they get by the part for values.
Latents then are both keys and values (``paged.latent_attention``).

vLLM absorbs it for decode steps alone, because keys and values take less arithmetic for long
prompts. Here a tile has few query rows, for each of which they would be made anew, so prompts are
attended to in the same way as decode steps.

``W_UK_T`` and ``W_UV`` of a layer are views of the weight of ``kv_b_proj``. They take no memory of
their own, and who writes that weight has written them. If it has 8 bits, they have memory of their
own, and are derived again after each load (``rank.weights.parameters.derive_again``).

Importing this module registers the layer with vLLM.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionLayer,
    AttentionType,
    MLAAttentionImpl,
)
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_sleep_ascend.native.attention.metadata import (
    NPUAttentionMetadata,
    NPUAttentionMetadataBuilder,
)
from vllm_sleep_ascend.native.attention.paged import Rules, latent_attention
from vllm_sleep_ascend.native.attention.tiles import step_bytes


class NPUMLAMetadata(NPUAttentionMetadata):
    """What vLLM's layer asks for: which tokens are of decode steps. All are treated as such."""

    num_prefills: ClassVar[int] = 0
    prefill: ClassVar[None] = None

    @property
    def num_actual_tokens(self) -> int:
        return self.num_tokens

    num_decodes = num_decode_tokens = num_actual_tokens

    @property
    def decode(self) -> "NPUMLAMetadata":
        return self


class NPUMLAMetadataBuilder(NPUAttentionMetadataBuilder):
    """Describes each step's batch, once for all layers of a KV cache group."""

    metadata_class = NPUMLAMetadata

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.content = self.wide_queries = kv_cache_spec.head_size

    def _choose_operators(self, vllm_config: VllmConfig, layer_names: list[str]) -> bool:
        return False


class NPUMLAImpl(MLAAttentionImpl[NPUMLAMetadata]):
    """One layer's attention.

    Its arguments are vLLM's; those that it does not use are in ``_``.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        kv_lora_rank: int,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        **_: Any,
    ) -> None:
        if sliding_window is not None:
            raise NotImplementedError(
                "NPU attention: a sliding window in multi-head latent attention is not supported; "
                "choose another model"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_lora_rank = kv_lora_rank
        self.kv_cache_dtype = kv_cache_dtype
        self.rules = Rules(scale=self.scale, head_size=head_size)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        *_: object,
    ) -> None:
        """Store a step's latents.

        Args:
            kv_c_normed: ``[tokens, kv_lora_rank]``.
            k_pe: ``[tokens, 1, qk_rope_head_dim]``.
            kv_cache: ``[blocks, block_size, head_size]``, contiguous, written in place.
            slot_mapping: ``[tokens]``; -1 for padding, which goes to the null block.
            kv_cache_dtype: not used.
            k_scale: not used.
            _: vLLM 0.33 adds what concerns a cache in 8 bits.
        """
        if kv_cache.numel() == 0:  # vLLM's profiling run, before there is a cache
            return
        latents = torch.cat((kv_c_normed, k_pe.flatten(1)), dim=-1).to(kv_cache.dtype)
        rows = slot_mapping[: len(latents)].long().clamp(min=0)
        kv_cache.view(-1, self.head_size).index_copy_(0, rows, latents)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: NPUMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, None]:
        """What each head gets of the latents, ``[tokens, heads, kv_lora_rank]``.

        Args:
            q: ``[tokens, heads, head_size]``, or its absorbed and its rotated part.
            kv_c_and_k_pe_cache: as for ``do_kv_cache_update``.
            attn_metadata: the step's batch.
            layer: not used.
        """
        first = q[0] if isinstance(q, tuple) else q
        output = first.new_empty(*first.shape[:2], self.kv_lora_rank)
        latent_attention(q, kv_c_and_k_pe_cache, output, attn_metadata.tiles, self.rules)
        return output, None


class NPUMLABackend(AttentionBackend):
    """Any sizes, one KV cache layout."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "NPU_MLA"

    @staticmethod
    def get_impl_cls() -> type[NPUMLAImpl]:
        return NPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[NPUMLAMetadataBuilder]:
        return NPUMLAMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


class NoPrefill(MLAPrefillBackend):
    """vLLM's layer asks for what attends to prompts, and never calls it here."""

    supported_dtypes: ClassVar[list[torch.dtype]] = NPUMLABackend.supported_dtypes

    @staticmethod
    def get_name() -> str:
        return "NPU_MLA"

    def run_prefill_new_tokens(self, *_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("prompts are attended to as decode steps are")

    run_prefill_context_chunk = run_prefill_new_tokens  # type: ignore[assignment]


@MultiHeadLatentAttentionWrapper.register_oot(name="MultiHeadLatentAttentionWrapper")
class NPUMultiHeadLatentAttention(MultiHeadLatentAttentionWrapper):  # type: ignore[misc]
    """vLLM's module around the layer. Its profiling run takes the memory of a step here, in place
    of keys and values of a long context."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        row = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        row *= torch.get_default_dtype().itemsize
        self.mla_attn._chunked_prefill_workspace_size = -(-self._step_bytes() // row)
        derive = self.mla_attn.process_weights_after_loading
        self.mla_attn.process_weights_after_loading = partial(  # type: ignore[method-assign]
            _derive_in_place, self.mla_attn, derive
        )

    def _step_bytes(self) -> int:
        """Absorbed queries and what they get, of all tokens and heads; then either attention, or
        the product with ``W_UV``, for which an NPU makes its operand contiguous."""
        tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        element = tokens * self.num_heads * torch.get_default_dtype().itemsize
        product = element * (self.kv_lora_rank + self.v_head_dim)
        return 2 * element * self.kv_lora_rank + max(step_bytes(tokens), product)


def _derive_in_place(
    layer: nn.Module, derive: Callable[[torch.dtype], None], act_dtype: torch.dtype
) -> None:
    """Matrices that have memory of their own keep it. vLLM 0.33 gives them other memory if their
    strides are not those that it derives, and ``native.quantization.compact`` changes these."""
    before = {
        name: parameter.data
        for name in ("W_UK_T", "W_UV")
        if (parameter := layer._parameters.get(name)) is not None and not parameter.is_meta
    }
    derive(act_dtype)
    for name, memory in before.items():
        parameter = layer.get_parameter(name)
        if parameter.data_ptr() != memory.data_ptr():
            memory.copy_(parameter.data)
            parameter.data = memory
