# SPDX-License-Identifier: Apache-2.0
"""What a step tells the layers of a KV cache group: the batch for the operator (``fused``), and the
tiles for PyTorch (``paged``)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec, EncoderOnlyAttentionSpec, SlidingWindowSpec

from vllm_sleep_ascend.native.attention import fused
from vllm_sleep_ascend.native.attention.kv_cache import Rows
from vllm_sleep_ascend.native.attention.tiles import (
    Kept,
    Tile,
    make_decode_tiles,
    make_tile,
    plan_tiles,
)

if TYPE_CHECKING:
    from vllm_sleep_ascend.native.attention.backend import NPUAttentionImpl


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
    metadata_class: ClassVar[type[NPUAttentionMetadata]] = NPUAttentionMetadata

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
        self.wide_queries = 0
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
        impls = [cast("NPUAttentionImpl", layer.impl) for layer in layers.values()]  # type: ignore[attr-defined]
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
                wide=self.wide_queries,
            )
            batch = query_lens, query_start, lengths, block_table, self.window
            kept = Kept()
            return [make_tile(plan, *batch, kept) for plan in plans]

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
        return self.metadata_class(starts[-1], causal, make_tiles, batch)

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
            wide=self.heads * self.wide_queries,
        )
        batch = None
        if self.mask is not None and self.max_keys <= fused.MOST_KEYS:
            none = fused.Batch([], [], common.block_table_tensor, self.mask, self.block_size)
            batch = none.padded(common.num_reqs)
        return self.metadata_class(common.num_actual_tokens, True, make_tiles, batch, set())

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> NPUAttentionMetadata:
        """Like ``build``, but the host's sequence lengths are outdated for a draft model."""
        common = replace(common_attn_metadata, seq_lens_cpu_upper_bound=None)
        return self.build(0, common, fast_build=True)
