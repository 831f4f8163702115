# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention interface: an NPU operator where it can do the layer and the batch (``fused``),
and plain PyTorch otherwise (``paged``)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import ClassVar, cast

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    EncoderOnlyAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
)

from vllm_sleep_ascend.native.attention import choice, fused
from vllm_sleep_ascend.native.attention.kv_cache import Rows, halves, write_kv
from vllm_sleep_ascend.native.attention.paged import Rules, dense_attention, paged_attention
from vllm_sleep_ascend.native.attention.tiles import (
    PEAK_BYTES,
    Tile,
    make_decode_tiles,
    make_tile,
    plan_tiles,
)


@dataclass
class NPUAttentionMetadata(AttentionMetadata):
    """What the layers of a KV cache group need for one step."""

    num_tokens: int
    causal: bool
    make_tiles: Callable[[], list[Tile]]
    batch: fused.Batch | None = None
    """What the operator needs; None if it computes no layer of the group."""
    captured: set[tuple[fused.Layout, int]] | None = None
    """If a graph is captured: the operator's layouts, and the blocks of the caches."""
    _rows: Rows | None = None

    @cached_property
    def tiles(self) -> list[Tile]:
        """What PyTorch needs. Made by the first layer, so that a graph makes those of its steps."""
        return self.make_tiles()

    def rows(self, slots: torch.Tensor, block_size: int) -> Rows:
        """Where the tokens of these slots go, computed once for the layers that share them."""
        if self._rows is None or self._rows.slots is not slots:
            self._rows = Rows(slots, block_size)
        return self._rows


class NPUAttentionMetadataBuilder(AttentionMetadataBuilder[NPUAttentionMetadata]):
    """Describes each step's batch, once for all layers of a KV cache group."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.encoder = isinstance(kv_cache_spec, EncoderOnlyAttentionSpec)
        # Layers of a group may have different windows; only this spec guarantees a single one.
        self.window = (
            kv_cache_spec.sliding_window if isinstance(kv_cache_spec, SlidingWindowSpec) else None
        )
        self.kv_heads = kv_cache_spec.num_kv_heads
        self.content = kv_cache_spec.head_size + (
            getattr(kv_cache_spec, "head_size_v", None) or kv_cache_spec.head_size
        )
        model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
        self.max_keys = model_config.max_model_len
        self.heads = get_num_attention_heads_from_layers(
            vllm_config, layer_names
        ) or model_config.get_num_attention_heads(parallel_config)
        self.block_size = kv_cache_spec.block_size
        self.mask: torch.Tensor | None = None
        if not self.encoder and self._choose_operators(vllm_config, layer_names):
            self.mask = fused.causal_mask(device)
        # With asynchronous scheduling, the host assumes that every draft token was accepted.
        self.knows_lengths = (
            vllm_config.speculative_config is None
            or not vllm_config.scheduler_config.async_scheduling
        )

    def _choose_operators(self, vllm_config: VllmConfig, layer_names: list[str]) -> bool:
        """Have each layer choose. Whether one attends with the operator."""
        layers = get_layers_from_vllm_config(
            vllm_config,
            AttentionLayerBase,  # type: ignore[type-abstract]
            layer_names,
        )
        impls = [cast(NPUAttentionImpl, layer.impl) for layer in layers.values()]  # type: ignore[attr-defined]
        for impl in impls:
            impl.choose_operators(self.device, self.kv_cache_spec)  # type: ignore[arg-type]
        return any(impl.operators.layout is not None for impl in impls)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> NPUAttentionMetadata:
        """Describe a batch.

        Raises:
            NotImplementedError: some requests are causal and some are not.
        """
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError(
                "NPU attention: a batch that mixes causal and non-causal requests (diffusion "
                "decoding) is not supported; use an autoregressive model"
            )
        causal = bool(common.causal) and not self.encoder
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        query_lens = [end - start for start, end in pairwise(starts)]
        bounds = common.seq_lens_cpu_upper_bound
        if self.encoder:
            seq_lens = query_lens
        elif bounds is not None:
            seq_lens = bounds[: common.num_reqs].tolist()
        else:
            seq_lens = common.seq_lens[: common.num_reqs].tolist()

        query_start, lengths = common.query_start_loc, common.seq_lens
        block_table = common.block_table_tensor

        def make_tiles() -> list[Tile]:
            plans = plan_tiles(
                query_lens,
                seq_lens,
                heads=self.heads,
                kv_heads=self.kv_heads,
                content=self.content,
                causal=causal,
                window=self.window,
            )
            return [
                make_tile(plan, query_lens, query_start, lengths, block_table, self.window)
                for plan in plans
            ]

        batch = None
        if self.mask is not None and causal and (bounds is None or self.knows_lengths):
            real = len(query_lens) - query_lens.count(0)
            assert not any(query_lens[real:]), "padding comes last"
            batch = fused.Batch(
                starts[1 : real + 1],
                seq_lens[:real],
                block_table[:real],
                self.mask,
                self.block_size,
            )
        return NPUAttentionMetadata(starts[-1], causal, make_tiles, batch)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> NPUAttentionMetadata:
        """For a graph of decode steps, which finds the requests of each replay in vLLM's tensors of
        lengths and blocks. Its tiles are as long as a request may become; the operator is told the
        lengths of each replay (``native.graphs``)."""
        common = common_attn_metadata
        make_tiles = partial(
            make_decode_tiles,
            common.seq_lens,
            common.block_table_tensor,
            max_keys=self.max_keys,
            kv_heads=self.kv_heads,
            content=self.content,
            window=self.window,
        )
        batch = None
        if self.mask is not None and self.max_keys <= fused.MOST_KEYS:
            none = fused.Batch([], [], common.block_table_tensor, self.mask, self.block_size)
            batch = none.padded(common.num_reqs)
        return NPUAttentionMetadata(common.num_actual_tokens, True, make_tiles, batch, set())

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> NPUAttentionMetadata:
        """Like ``build``, but the host's sequence lengths are outdated for a draft model."""
        common = replace(common_attn_metadata, seq_lens_cpu_upper_bound=None)
        return self.build(0, common, fast_build=True)


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
            torch.empty(PEAK_BYTES, dtype=torch.uint8, device=output.device)
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
