# SPDX-License-Identifier: Apache-2.0
"""The parts of vLLM's worker that a rank uses, on any platform and supported version."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm import config
    from vllm.distributed.weight_transfer import WeightTransferEngine
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_sleep_ascend.memory.backend import CamemBackend


class HostWorker(Protocol):
    """vLLM's worker. ``update_config`` may replace its configurations, so never cache them."""

    rank: int
    device: torch.device
    vllm_config: "config.VllmConfig"
    model_config: "config.ModelConfig"
    load_config: "config.LoadConfig"
    cache_config: "config.CacheConfig"
    parallel_config: "config.ParallelConfig"
    speculative_config: "config.SpeculativeConfig | None"
    model_runner: "GPUModelRunner"
    weight_transfer_engine: "WeightTransferEngine[Any, Any] | None"
    _weight_update_active: bool  # from start_weight_update to finish_weight_update

    @property
    def sleep_mode_backend(self) -> "CamemBackend":
        """Exists only with sleep mode."""

    def synchronize_device(self) -> None: ...
    def get_draft_model(self) -> nn.Module | None: ...
    def get_kv_cache_spec(self) -> "dict[str, KVCacheSpec]": ...


def draft_model_config(worker: HostWorker) -> "config.ModelConfig":
    """The configuration of a worker's draft model, which must exist."""
    assert worker.speculative_config is not None
    return worker.speculative_config.draft_model_config
