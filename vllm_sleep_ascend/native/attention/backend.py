# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention interface: an NPU operator where it can do the layer and the batch (``fused``),
and plain PyTorch otherwise (``paged``). What a step tells the layers is in ``metadata``."""

from dataclasses import replace
from typing import ClassVar

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionType,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_sleep_ascend.native.attention import choice, fused
from vllm_sleep_ascend.native.attention.kv_cache import Rows, halves, write_kv
from vllm_sleep_ascend.native.attention.metadata import (
    NPUAttentionMetadata,
    NPUAttentionMetadataBuilder,
)
from vllm_sleep_ascend.native.attention.paged import Rules, dense_attention, paged_attention
from vllm_sleep_ascend.native.attention.tiles import step_bytes


class NPUAttentionImpl(AttentionImpl[NPUAttentionMetadata]):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type not in (AttentionType.DECODER, AttentionType.ENCODER_ONLY):
            raise NotImplementedError(
                f"NPU attention: attention type '{attn_type}' (encoder-decoder models) is not "
                "supported; use a decoder-only or an encoder-only model"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.alibi_slopes = alibi_slopes
        self.layer: fused.Layer | None = None
        self.operators = choice.Choice()
        self.rules = Rules(
            scale=self.scale,
            head_size=head_size,
            window=sliding_window,
            soft_cap=logits_soft_cap or 0.0,
            sinks=sinks,
        )

    def choose_operators(self, device: torch.device, spec: AttentionSpec) -> None:
        """Choose operators for the caches of that kind; until then the layer has none."""
        rules, size = self.rules, self.head_size
        plain = rules.soft_cap or self.alibi_slopes is not None or rules.sinks is not None
        if plain or spec.head_size != size or (spec.head_size_v or size) != size:
            return
        self.layer = fused.Layer(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            spec.dtype,
            spec.block_size,
            self.scale,
            rules.window,
        )
        self.operators = choice.choose(device, self.layer)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: NPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write attention into ``output``.

        Args:
            layer: the layer; its quantisation scales are not used.
            query: ``[tokens, heads, head_size]``.
            key: ``[tokens, kv_heads, head_size]``; already in the cache.
            value: ``[tokens, kv_heads, head_size_v]``; already in the cache.
            kv_cache: ``[blocks, kv_heads, block_size, head_size + head_size_v]``.
            attn_metadata: the step's batch; None in vLLM's profiling and warm-up runs.
            output: ``[tokens, heads, head_size_v]``.
            output_scale: not supported.
            output_block_scale: not supported.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "NPU attention: fused output quantisation is not supported; "
                "use an unquantised model"
            )
        if attn_metadata is None:
            # Profiling: allocate the scratch memory that a real step may need.
            torch.empty(step_bytes(len(output)), dtype=torch.uint8, device=output.device)
            return output.zero_()
        if self._attend_by_operator(query, kv_cache, attn_metadata, output):
            return output
        if self.alibi_slopes is not None and self.rules.alibi_slopes is None:
            slopes = torch.tensor(self.alibi_slopes, dtype=torch.float32, device=query.device)
            self.rules = replace(self.rules, alibi_slopes=slopes)
        rules = self.rules
        if rules.causal != attn_metadata.causal:
            rules = replace(rules, causal=attn_metadata.causal)
        tokens = attn_metadata.num_tokens
        query, result = query[:tokens], output[:tokens]
        if self.attn_type == AttentionType.ENCODER_ONLY:
            dense_attention(query, key[:tokens], value[:tokens], result, attn_metadata.tiles, rules)
        else:
            paged_attention(query, kv_cache, result, attn_metadata.tiles, rules)
        return output

    def _attend_by_operator(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: NPUAttentionMetadata,
        output: torch.Tensor,
    ) -> bool:
        """Whether the operator did it."""
        layout, batch = self.operators.layout, attn_metadata.batch
        if layout is None or batch is None or query.dtype != kv_cache.dtype:
            return False
        assert self.layer is not None
        both = halves(kv_cache, self.head_size)
        if both is None or not batch.takes(layout, len(both) - 1):
            return False
        tokens, workspace = attn_metadata.num_tokens, None
        if attn_metadata.captured is not None:
            attn_metadata.captured.add((layout, len(both) - 1))
            workspace = fused.workspace(self.layer, layout, query[:tokens], both, batch)
        fused.attend(self.layer, layout, query[:tokens], both, output[:tokens], batch, workspace)
        return True

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store a step's keys and values; ``slot_mapping`` is ``[tokens]``, -1 for padding."""
        if self.attn_type != AttentionType.DECODER:
            return
        metadata = get_attention_context(layer.layer_name)[0]  # type: ignore[arg-type]
        if isinstance(metadata, NPUAttentionMetadata):
            rows = metadata.rows(slot_mapping, kv_cache.shape[2])
        else:
            rows = Rows(slot_mapping, kv_cache.shape[2])
        both = halves(kv_cache, self.head_size) if self.operators.writes else None
        if both is not None and key.dtype == kv_cache.dtype:
            fused.write(both, key, value, rows)
        else:
            write_kv(kv_cache, key, value, rows)


@register_backend(AttentionBackendEnum.CUSTOM)
class NPUAttentionBackend(AttentionBackend):
    """Any head size, any block size, one KV cache layout."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[NPUAttentionImpl]:
        return NPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[NPUAttentionMetadataBuilder]:
        return NPUAttentionMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """vLLM's default, with contiguous token rows: with others the NPU's index operators copy a
        layer's whole cache at each access."""
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_ONLY)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False
