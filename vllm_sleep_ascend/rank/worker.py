# SPDX-License-Identifier: Apache-2.0
"""What vLLM, an engine or a user calls by name on a rank's worker. What it does is said where it is
done."""

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch

from vllm_sleep_ascend.config import SleepModeConfig, check_enabled
from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.memory.device_wait import wait_for_device
from vllm_sleep_ascend.policy import NEEDS, NEEDS_WEIGHTS, STEP_CALLS, Place
from vllm_sleep_ascend.rank.agreement import Agreement
from vllm_sleep_ascend.rank.communicators import meet
from vllm_sleep_ascend.rank.guarded_calls import asleep_error
from vllm_sleep_ascend.rank.hooks import Hooks
from vllm_sleep_ascend.rank.host_worker import HostWorker
from vllm_sleep_ascend.rank.image import saving
from vllm_sleep_ascend.rank.image.identity import identity_or_reason
from vllm_sleep_ascend.rank.operations import Operations
from vllm_sleep_ascend.rank.sleeping import SleepMode, status_without_sleep_mode
from vllm_sleep_ascend.rank.start_memory import StartMemory, least_kv_cache
from vllm_sleep_ascend.rank.weights.content import DRAFT, models_of
from vllm_sleep_ascend.rank.weights.layerwise import forget
from vllm_sleep_ascend.rank.weights.load import Named
from vllm_sleep_ascend.rank.weights.rank_weights import RankWeights
from vllm_sleep_ascend.status import RankStatus, WeightsOrigin, WeightsReport

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu_worker import Worker as StockWorker

    from vllm_sleep_ascend.memory.backend import CamemBackend
else:
    StockWorker = object  # vLLM's worker, or vllm-ascend's, is a base of each subclass


def needs_weights_awake(cls: type) -> type:
    """Class decorator: have methods that use weights refuse to touch them while they sleep, and
    tell the allocator of the steps of the model."""

    def refusing(name: str, stock: Callable[..., object]) -> Callable[..., object]:
        @wraps(stock)
        def call(self: HostWorker, *args: object, **kwargs: object) -> object:
            if self.model_config.enable_sleep_mode:
                asleep = [tag for tag in NEEDS[name] if self.sleep_mode_backend.asleep(tag)]
                if asleep:
                    raise asleep_error(self, name, asleep)
            return stock(self, *args, **kwargs)

        return call

    def telling(stock: Callable[..., object]) -> Callable[..., object]:
        @wraps(stock)
        def call(self: HostWorker, *args: object, **kwargs: object) -> object:
            if not self.model_config.enable_sleep_mode:
                return stock(self, *args, **kwargs)
            with self.sleep_mode_backend.step():
                return stock(self, *args, **kwargs)

        return call

    # vLLM's versions differ in what a worker can do.
    for name in filter(partial(hasattr, cls), STEP_CALLS):
        setattr(cls, name, telling(getattr(cls, name)))
    for name in filter(partial(hasattr, cls), (*NEEDS_WEIGHTS, "execute_dummy_batch")):
        setattr(cls, name, refusing(name, getattr(cls, name)))
    return cls


class SleepingWorker(StockWorker):
    """Mixin for vLLM's worker."""

    device: torch.device
    sleep_mode_backend: "CamemBackend"
    _start_memory: StartMemory
    agreement: Agreement  # once the ranks have met
    # Once the model is loaded: they refer to the worker, and one that fails to load ends at once
    _sleep_hooks: Hooks
    rank_weights: RankWeights
    _identity: dict[str, Any] | str  # of the engine, before its model was made, or why it has none
    operations: Operations  # with sleep mode alone
    _sleep_mode: SleepMode  # with sleep mode alone

    # --- Start and end ---------------------------------------------------------------------------

    def _join_ranks(self) -> None:
        """From here on operate together with the other ranks of the engine, which have met, and
        keep an account of the device's memory until the engine has started."""
        from vllm.distributed.parallel_state import get_pp_group

        meet(get_pp_group().device_group)
        ranks = self.parallel_config.world_size
        timeout_s = SleepModeConfig.slowest_rank_s(self.vllm_config)
        self.agreement = Agreement(self.rank, ranks, self.device.index, timeout_s)
        wait_s = SleepModeConfig.from_vllm_config(self.vllm_config).wake_timeout_s
        utilization = self.cache_config.gpu_memory_utilization
        self._start_memory = StartMemory(self.device, utilization, wait_s)

    def _make_hooks(self) -> Hooks:
        return Hooks(self)

    def load_model(self, **kwargs: bool) -> None:
        """
        Raises:
            DeviceOutOfMemoryError: the weights do not fit; says who holds the device's memory.
        """
        self._identity = identity_or_reason(self.vllm_config)
        with self._start_memory.named("the weights"):
            super().load_model(**kwargs)
            self._sleep_hooks = self._make_hooks()
            self.rank_weights = RankWeights(
                self, self.agreement, self._sleep_hooks, super().reload_weights
            )
        if self.model_config.enable_sleep_mode:
            self.operations = Operations(self, self.agreement)
            self._sleep_mode = SleepMode(
                self, self.operations, self.rank_weights, self._sleep_hooks
            )

    def _run_largest_batch(self) -> None:
        raise NotImplementedError

    def _run_largest_graph(self) -> None:
        """The largest batch that becomes a graph, if memory for it has to be left."""

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: this engine's share less what the process holds and a batch
        takes. The methods of vLLM and vllm-ascend take all memory that goes or comes for this
        engine's own.

        Raises:
            DeviceOutOfMemoryError: other processes leave too little; says who holds how much.
        """
        with self._start_memory.named("the largest batch"):
            if self.cache_config.kv_cache_memory_bytes:
                return super().determine_available_memory()
            self.available_kv_cache_memory_bytes = self._start_memory.for_kv_cache(
                self._run_largest_batch, self._run_largest_graph, least=least_kv_cache(self)
            )
        return self.available_kv_cache_memory_bytes

    def initialize_from_config(self, kv_cache_config: "KVCacheConfig") -> None:
        """Allocate the KV cache; wait for memory that another process took since it was measured.

        Raises:
            DeviceOutOfMemoryError: it did not come back within ``wake_timeout_s``.
        """
        with self._start_memory.named("the KV cache"), self._start_memory.waiting_allocations():
            super().initialize_from_config(kv_cache_config)

    def shutdown(self) -> None:
        """End the worker, and give device memory back while the process still has a device."""
        loaded = getattr(getattr(self, "model_runner", None), "model", None) is not None
        models = models_of(self) if loaded else {}
        super().shutdown()
        forget(models.values())
        if self.model_config.enable_sleep_mode:
            from vllm_sleep_ascend.memory.pool import release_pools

            release_pools()

    # --- Sleep and wake --------------------------------------------------------------------------

    @property
    def sleep_mode(self) -> SleepMode:
        """
        Raises:
            ValueError: the engine was started without sleep mode.
        """
        check_enabled(self.vllm_config)
        return self._sleep_mode

    def sleep(self, level: int = 1, to: Place | None = None) -> None:
        self.sleep_mode.sleep(level, to)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.sleep_mode.wake_up(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        self.sleep_mode.discard(tags)

    def sleep_refusal(self, level: int) -> str | None:
        return self.sleep_mode.refusal(level)

    def sleeping_tags(self) -> set[str]:
        return self.sleep_mode.sleeping_tags()

    def sleep_status(self) -> RankStatus:
        enabled = self.model_config.enable_sleep_mode
        return self.sleep_mode.status() if enabled else status_without_sleep_mode(self)

    def synchronize_device(self) -> None:
        """Called by vLLM before a sleep. It waits no longer than ``device_timeout_s``, and an error
        names the rank."""
        wait = wait_for_device
        if not self.model_config.enable_sleep_mode:
            wait = super().synchronize_device
        try:
            wait()
        except RuntimeError as error:
            where = f"rank {self.rank}, device {self.device.index}"
            error.args = (f"{where}: {error}",)
            if self.agreement.size > 1:
                write_type(error)
            raise

    # --- Weights ---------------------------------------------------------------------------------

    def weights_content(self) -> WeightsReport:
        return self.rank_weights.report()

    def weights_status(self) -> WeightsOrigin:
        return self.rank_weights.origin()

    def set_weight_version(self, version: str) -> None:
        self.rank_weights.set_version(version)

    def save_image(self, directory: str, replace: bool = False) -> None:
        check_enabled(self.vllm_config)
        saving.save(
            *(self, self.agreement, self.rank_weights, self._sleep_hooks, self._identity),
            directory=directory,
            replace=replace,
        )

    def mark_weights_loaded(self) -> None:
        self.rank_weights.mark_loaded()

    def reload_weights(
        self,
        weights_iterator: Iterable[Named] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        self.rank_weights.reload(weights_iterator, weights_path, is_checkpoint_format)

    def start_weight_update(self, *args: Any, **kwargs: Any) -> None:
        self.rank_weights.start_update(partial(super().start_weight_update, *args, **kwargs))

    def start_draft_weight_update(self) -> None:
        self.rank_weights.start_update(super().start_draft_weight_update, DRAFT)

    def update_weights(self, update_info: dict[str, object] | list[dict[str, object]]) -> None:
        self.rank_weights.update(partial(super().update_weights, update_info))

    def finish_weight_update(self) -> None:
        self.rank_weights.finish_update(super().finish_weight_update)
