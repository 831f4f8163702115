# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker on an NPU."""

import gc
import sys
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch_npu
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.utils.gc_utils import freeze_gc_heap, maybe_attach_gc_debug_callback
from vllm.utils.mem_utils import MemorySnapshot, format_gib
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sleep_ascend.config import IMAGE_FORMAT, SleepModeConfig
from vllm_sleep_ascend.memory.account import held_bytes
from vllm_sleep_ascend.rank.at_exit import finish_before_torch_npu
from vllm_sleep_ascend.rank.host_budget import ranks_of_this_host
from vllm_sleep_ascend.rank.worker import SleepingWorker, needs_weights_awake

if TYPE_CHECKING:
    from vllm_sleep_ascend.native.model_runner import NPUModelRunner

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")

_sleeping_worker: "weakref.ref[NPUWorker] | None" = None  # the one with sleep mode on


@needs_weights_awake
class NPUWorker(SleepingWorker, Worker):
    """The stock worker on an NPU."""

    def init_device(self) -> None:
        """Open the device, join the other ranks, and check that the engine's share is free.

        Raises:
            ValueError: the rank has no device, or after ``wake_timeout_s`` too little memory is
                still free for ``gpu_memory_utilization``.
        """
        # vLLM collects garbage a dozen times at start-up. Skip what has been imported so far.
        freeze_gc_heap()
        self._choose_device()
        finish_before_torch_npu()
        if self.model_config.enable_sleep_mode:
            self._require_no_other_engine()
            self.sleep_mode_backend.configure(SleepModeConfig.from_vllm_config(self.vllm_config))
        current_platform.check_if_supports_dtype(self.model_config.dtype)  # type: ignore[arg-type]
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        self._join_ranks()
        set_random_seed(self.model_config.seed)
        gc.collect()
        torch_npu.npu.empty_cache()
        self._wake_what_was_left()
        self._start_memory.require()
        self.init_snapshot = MemorySnapshot(device=self.device)  # for vLLM's logs
        self.requested_memory = self._start_memory.share
        self._init_workspace_and_model_runner()

    def _require_no_other_engine(self) -> None:
        """Sleep covers the tagged memory of the whole process, so one engine may use it."""
        if _sleep_mode_is_in_use():
            raise ValueError(
                "another engine of this process has sleep mode on, and only one can: shut it down, "
                "or start this one in a process of its own"
            )

    def _wake_what_was_left(self) -> None:
        """Wake what an engine of this process left asleep when it ended."""
        if "vllm_sleep_ascend._camem" not in sys.modules or _sleep_mode_is_in_use():
            return
        from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory

        enabled = self.model_config.enable_sleep_mode
        memory = self.sleep_mode_backend if enabled else SleepingMemory()
        memory.wake_what_was_left()

    def _choose_device(self) -> None:
        parallel = self.parallel_config
        assigned = parallel.assigned_physical_gpu_ids
        # vLLM gives each replica of a data-parallel server a list of only its own devices.
        has_own_list = assigned is not None and len(assigned) <= parallel.local_world_size
        if (
            parallel.distributed_executor_backend not in ("ray", "external_launcher")
            and parallel.data_parallel_backend != "ray"
            and parallel.nnodes_within_dp == 1
            and not has_own_list
        ):
            replica = parallel.data_parallel_rank_local
            if replica is None:
                replica = parallel.data_parallel_index
            self.local_rank += replica * parallel.world_size
        if assigned is not None:
            set_assigned_physical_gpu_ids(assigned)
        available = current_platform.device_count() if assigned is None else len(assigned)
        if self.local_rank >= available:
            raise ValueError(
                f"NPU: rank {self.rank} needs device {self.local_rank}, but {available} "
                f"{'is' if available == 1 else 'are'} available; make more visible with "
                f"{current_platform.device_control_env_var} or use fewer ranks"
            )
        index = current_platform.logical_device_id_to_visible_device_id(self.local_rank)
        self.device = torch.device(current_platform.device_type, index)
        current_platform.set_device(self.device)

    def _make_model_runner(self) -> "NPUModelRunner":
        import vllm_sleep_ascend.native.dense.layers
        from vllm_sleep_ascend.native.dense import operators
        from vllm_sleep_ascend.native.model_runner import NPUModelRunner

        operators.choose(
            self.device,
            self.model_config.dtype,  # type: ignore[arg-type]
            self.model_config.get_head_size(),
        )
        models = [self.model_config]
        if self.speculative_config is not None and self.speculative_config.draft_model_config:
            models.append(self.speculative_config.draft_model_config)
        if any(model.is_moe for model in models):
            import vllm_sleep_ascend.native.moe
        if any(model.use_mla for model in models):
            import vllm_sleep_ascend.native.attention.mla
        if self.vllm_config.quant_config is not None:
            import vllm_sleep_ascend.native.quantization  # noqa: F401
        if self.load_config.load_format == IMAGE_FORMAT:
            from vllm_sleep_ascend.rank.image.loader import register

            register()

        return NPUModelRunner(self.vllm_config, self.device)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        """The pool for allocations of a tag, if sleep mode is on."""
        if not self.model_config.enable_sleep_mode:
            return nullcontext()
        from vllm_sleep_ascend.memory.pool import use_pool

        return use_pool(tag)

    def _run_largest_batch(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.profile_run(self.randomize_dummy_inputs)

    def _run_largest_graph(self) -> None:
        sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or ()
        decodes = [size for size in sizes if size <= self.scheduler_config.max_num_seqs]
        if decodes:
            with set_current_vllm_config(self.vllm_config):
                self.model_runner._dummy_run(max(decodes), is_profile=True)

    def checkpoint_prepare(self) -> None:
        """
        Raises:
            NotImplementedError: always. The stock method would report success.
        """
        raise NotImplementedError(
            "NPU: process checkpoints are not supported, because CANN cannot save a device's state "
            "with its process; to free the device and keep the process, use sleep(level=1)"
        )

    checkpoint_restore = checkpoint_prepare

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Capture the graphs, and finish the start-up. Nothing is compiled, and profiling has
        already run a full batch.

        The stock method is not called, because its kernel warm-up needs torchvision.
        """
        global _sleeping_worker
        self.model_runner.maybe_remove_all_loras(self.model_runner.lora_config)
        with self._start_memory.named("the graphs"):
            self.model_runner.capture_model()
        # Sampling must not depend on the random numbers that start-up used.
        set_random_seed(self.model_config.seed, self.parallel_config.data_parallel_index)
        freeze_gc_heap()
        maybe_attach_gc_debug_callback()
        if self.model_config.enable_sleep_mode:
            self.sleep_mode_backend.prepare(ranks_of_this_host(self.parallel_config))
            _sleeping_worker = weakref.ref(self)
        logger.info(
            "NPU %s: this process holds %s GiB after start-up; %s GiB of %s GiB are free.",
            self.device.index,
            format_gib(held_bytes(self.device)),
            *(format_gib(n) for n in torch_npu.npu.mem_get_info(self.device)),
        )
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def shutdown(self) -> None:
        """End the worker. Another engine of this process may then use sleep mode."""
        global _sleeping_worker
        super().shutdown()
        if _sleeping_worker is not None and _sleeping_worker() is self:
            _sleeping_worker = None


def _sleep_mode_is_in_use() -> bool:
    """Whether an engine of this process has sleep mode on."""
    return _sleeping_worker is not None and _sleeping_worker() is not None
