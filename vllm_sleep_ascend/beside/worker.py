# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's worker with our sleep mode."""

import time
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.beside import allocator
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.rank.at_exit import finish_before_torch_npu
from vllm_sleep_ascend.rank.host_budget import ranks_of_this_host
from vllm_sleep_ascend.rank.worker import SleepingWorker, needs_weights_awake

allocator.install()

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm_ascend.worker.worker import NPUWorker  # noqa: E402

from vllm_sleep_ascend.beside.hooks import AscendHooks  # noqa: E402

logger = init_logger(f"vllm.{__name__}")

_TOO_LITTLE_FREE = "Free memory on device"  # the start of vllm-ascend's error
_POLL_S = 0.01


class _LaterWorker(NPUWorker):
    """Methods that our mixin calls, and that later versions of vLLM's worker have."""

    def reload_weights(self, **options: Any) -> None:
        """Load all weights in place."""
        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            self.model_runner.reload_weights(**options)

    def get_draft_model(self) -> nn.Module | None:
        model = getattr(getattr(self.model_runner, "drafter", None), "model", None)
        return model if isinstance(model, nn.Module) else None


@needs_weights_awake
class SleepingNPUWorker(SleepingWorker, _LaterWorker):
    """vllm-ascend's worker with transactional sleep and wake."""

    local_rank: int
    model_runner: Any  # vllm-ascend's
    _sleep_hooks: AscendHooks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sleep_mode_backend = allocator.SleepingAllocator.get_instance().backend

    def _make_hooks(self) -> AscendHooks:
        return AscendHooks(self)

    def init_device(self) -> None:
        """Open the device and join the other ranks."""
        finish_before_torch_npu()
        self.sleep_mode_backend.configure(SleepModeConfig.from_vllm_config(self.vllm_config))
        super().init_device()
        self._join_ranks()

    def _init_device(self) -> torch.device:
        """Retry for up to ``wake_timeout_s`` while too little device memory is free: vllm-ascend
        checks that before it joins other ranks.

        Raises:
            ValueError: vllm-ascend's, because too little was free all the time.
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
                    logger.info("Waiting up to %s s to start: %s", wait_s, error)
                told = True
            self.local_rank = local_rank  # later versions of vllm-ascend change it
            time.sleep(_POLL_S)

    def _run_largest_batch(self) -> None:
        self.model_runner.profile_run()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.sleep_mode_backend.prepare(ranks_of_this_host(self.parallel_config))
        return times

    # --- Running the model or loading weights needs the experts in the kernels' layout -----------

    def execute_model(self, scheduler_output: Any) -> Any:
        self._sleep_hooks.experts.close()
        return super().execute_model(scheduler_output)

    def execute_dummy_batch(self) -> None:
        self._sleep_hooks.experts.close()
        super().execute_dummy_batch()

    def start_weight_update(self, *args: Any, **options: Any) -> None:
        self._sleep_hooks.experts.close()
        super().start_weight_update(*args, **options)

    def reload_weights(self, *args: Any, **options: Any) -> None:
        """Load all weights in place; see ``SleepingWorker.reload_weights``."""
        self._sleep_hooks.experts.close()
        super().reload_weights(*args, **options)
