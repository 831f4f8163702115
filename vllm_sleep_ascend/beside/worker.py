# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's worker with our sleep and wake."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch_npu
from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.beside import allocator
from vllm_sleep_ascend.beside.expert_layouts import ExpertLayouts
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory.formats import is_tiled
from vllm_sleep_ascend.rank.at_exit import finish_before_torch_npu
from vllm_sleep_ascend.rank.communicators import meet
from vllm_sleep_ascend.rank.host_budget import ranks_of_this_host
from vllm_sleep_ascend.rank.sleeping import SleepingWorker, needs_weights_awake
from vllm_sleep_ascend.rank.start_memory import StartMemory, least_kv_cache
from vllm_sleep_ascend.rank.weights.content import DRAFT

allocator.install()

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed.parallel_state import get_pp_group  # noqa: E402
from vllm_ascend.ascend_config import get_ascend_config  # noqa: E402
from vllm_ascend.worker.worker import NPUWorker  # noqa: E402

logger = init_logger(f"vllm.{__name__}")

_TOO_LITTLE_FREE = "Free memory on device"  # how that error of vllm-ascend's begins
_POLL_S = 0.01


def _extra_cleanup() -> bool:
    return bool(getattr(get_ascend_config(), "enable_sleep_mode_extra_cleanup", False))


class _LaterWorker(NPUWorker):
    """What our mixins call and vLLM's own worker has in later versions."""

    def reload_weights(self, **options: Any) -> None:
        """Load all weights in place: see ``LoadingWorker.reload_weights``."""
        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            self.model_runner.reload_weights(**options)

    def get_draft_model(self) -> nn.Module | None:
        model = getattr(getattr(self.model_runner, "drafter", None), "model", None)
        return model if isinstance(model, nn.Module) else None


@needs_weights_awake
class SleepingNPUWorker(SleepingWorker, _LaterWorker):
    """Sleep, wake and status as one transaction each, with vllm-ascend's own clean-up in it."""

    _pp_send_work: list[Any]
    local_rank: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sleep_mode_backend = allocator.SleepingAllocator.get_instance().backend
        self._experts = ExpertLayouts()
        self._weights_slept = self._graphs_dropped = False

    # --- Start and end ---------------------------------------------------------------------------

    def init_device(self) -> None:
        """Take the device and join the other ranks."""
        finish_before_torch_npu()
        config = SleepModeConfig.from_vllm_config(self.vllm_config)
        self.sleep_mode_backend.configure(config)
        super().init_device()
        meet(get_pp_group().device_group)
        self._join_ranks()
        utilization = self.cache_config.gpu_memory_utilization
        self._start_memory = StartMemory(self.device, utilization, config.wake_timeout_s)

    def _init_device(self) -> torch.device:
        """vllm-ascend refuses a device of which too little is free before it joins other ranks: up
        to ``wake_timeout_s`` that can be tried again.

        Raises:
            ValueError: vllm-ascend's, as too little stayed free.
        """
        wait_s = SleepModeConfig.from_vllm_config(self.vllm_config).wake_timeout_s
        deadline, local_rank, told = time.monotonic() + wait_s, self.local_rank, False
        while True:
            try:
                return super()._init_device()
            except ValueError as error:
                if not str(error).startswith(_TOO_LITTLE_FREE) or time.monotonic() >= deadline:
                    raise
                if not told:
                    logger.info("The start waits up to %s s: %s", wait_s, error)
                told = True
            self.local_rank = local_rank  # which later versions shift
            time.sleep(_POLL_S)

    def load_model(self, **kwargs: Any) -> None:
        """
        Raises:
            DeviceOutOfMemoryError: the weights do not fit; says who holds the device's memory.
        """
        with self._start_memory.named("the weights"):
            super().load_model(**kwargs)

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, by what this process holds. vllm-ascend's method takes all memory
        that goes or comes for this engine's own, and asserts that none came.

        Raises:
            DeviceOutOfMemoryError: other processes leave too little; says who holds how much.
        """
        with self._start_memory.named("the largest batch"):
            if self.cache_config.kv_cache_memory_bytes:
                return super().determine_available_memory()
            self.available_kv_cache_memory_bytes = self._start_memory.for_kv_cache(
                self.model_runner.profile_run, least=least_kv_cache(self)
            )
        return self.available_kv_cache_memory_bytes

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache; wait for memory that another process took since it was measured.

        Raises:
            DeviceOutOfMemoryError: it did not come back within ``wake_timeout_s``.
        """
        with self._start_memory.named("the KV cache"), self._start_memory.waiting_allocations():
            super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.sleep_mode_backend.prepare(ranks_of_this_host(self.parallel_config))
        return times

    # --- Sleep and wake --------------------------------------------------------------------------

    def sleep_refusal(self, level: int) -> str | None:
        """Level 2 needs weights that can be loaded again in place."""
        name = self._in_nz_format() if level == 2 else None
        if name is None:
            return super().sleep_refusal(level)
        return (
            f"weights in FRACTAL_NZ format ({name}) do not survive being loaded again in place, "
            "which level 2 needs; use level 1, or start with VLLM_ASCEND_ENABLE_NZ=0"
        )

    def _before_sleep(self) -> None:
        self._experts.close()
        for handle in self._pp_send_work:
            handle.wait()
        self._pp_send_work = []

    def _after_sleep(self) -> None:
        """Forget captured graphs, if vllm-ascend's extra clean-up is on. It cannot be taken back,
        and so comes once every rank sleeps. HCCL's part of it is in our transaction."""
        self._weights_slept = True
        if _extra_cleanup() and self.model_runner.use_aclgraph and not self._graphs_dropped:
            self._graphs_dropped = True
            self.sleep_wakeup_manager.acl_graph.sleep()
            gc.collect()
            torch_npu.npu.empty_cache()

    def _after_wake(self) -> None:
        """Graphs that are captured cannot be held and taken back, so this comes after the wake;
        where it fails on one rank, every rank does it again."""
        if not (self._weights_slept or self._graphs_dropped):
            return
        self._together("the end of a wake", self._make_usable)
        awake = not self.sleep_mode_backend.asleep("weights")
        if awake:
            self._weights_slept = False
        if awake and not self.sleep_mode_backend.asleep("kv_cache"):
            self._graphs_dropped = False

    def _make_usable(self) -> None:
        backend, manager = self.sleep_mode_backend, self.sleep_wakeup_manager
        if SleepModeConfig.releases_communicators(self.vllm_config):
            with set_current_vllm_config(self.vllm_config):
                manager.hccl.refresh_moe_hccl_groups()  # they know communicators by name
        if backend.asleep("weights"):
            return
        if self._graphs_dropped and not backend.asleep("kv_cache"):
            self._experts.close()  # what is captured runs the model
            manager.acl_graph.sleep()  # what an attempt before this one captured
            manager.acl_graph.wakeup()
        as_loaded = self.vllm_config.quant_config is None and not backend.reloads_after_level_2
        if self._weights_slept and as_loaded:
            hidden_size = self.model_config.hf_text_config.hidden_size
            self._experts.open(self.model_runner.model, hidden_size)

    def _preserved_names(self) -> list[str]:
        # vLLM 0.23 has no option of its own for this.
        config = SleepModeConfig.from_vllm_config(self.vllm_config)
        return [f"{DRAFT}*", *config.preserve_parameters]

    def _facts_of_load(self, prefix: str, check: Callable[[], None]) -> Any:
        """A copy of FRACTAL_NZ weights that comes back is in another format."""
        facts = super()._facts_of_load(prefix, check)
        return replace(facts, whole=facts.whole and self._in_nz_format() is None)

    def _check_reload(self, weights_path: str | None) -> None:
        """
        Raises:
            SleepModeError: weights are in FRACTAL_NZ format.
        """
        super()._check_reload(weights_path)
        name = self._in_nz_format()
        if name is not None:
            raise SleepModeError(
                f"weights in FRACTAL_NZ format ({name}) cannot be loaded again in place; start "
                "with VLLM_ASCEND_ENABLE_NZ=0"
            )

    def _reload_draft(self) -> None:
        """
        Raises:
            SleepModeError: always, as vLLM 0.23 loads a draft model once.
        """
        raise SleepModeError("a draft model cannot be loaded again; restart the engine")

    def _in_nz_format(self) -> str | None:
        """The name of a parameter in that format or its like, if there is one."""
        parameters = self._content.parameters().items()
        return next((name for name, parameter in parameters if is_tiled(parameter)), None)

    # --- What runs the model or loads weights needs the experts as the kernels want them ---------

    def execute_model(self, scheduler_output: Any) -> Any:
        self._experts.close()
        return super().execute_model(scheduler_output)

    def execute_dummy_batch(self) -> None:
        self._experts.close()
        super().execute_dummy_batch()

    def start_weight_update(self, is_checkpoint_format: bool = True) -> None:
        self._experts.close()
        super().start_weight_update(is_checkpoint_format)

    def reload_weights(self, *args: Any, **options: Any) -> None:
        """Load all weights in place: see ``LoadingWorker.reload_weights``."""
        self._experts.close()
        super().reload_weights(*args, **options)
