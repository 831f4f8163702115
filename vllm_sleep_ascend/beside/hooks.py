# SPDX-License-Identifier: Apache-2.0
"""What vllm-ascend needs at a sleep, a wake and a load of weights: its clean-up, and its kernels'
formats and layouts."""

import gc
from typing import TYPE_CHECKING

import torch_npu
from vllm.config import set_current_vllm_config

from vllm_sleep_ascend.beside import NO_IMAGES
from vllm_sleep_ascend.beside.expert_layouts import ExpertLayouts
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory.formats import is_tiled
from vllm_sleep_ascend.rank.hooks import Hooks

if TYPE_CHECKING:
    from vllm_sleep_ascend.beside.worker import SleepingNPUWorker


class AscendHooks(Hooks):
    """``experts`` has to be closed before the model runs or weights are loaded."""

    _worker: "SleepingNPUWorker"

    def __init__(self, worker: "SleepingNPUWorker") -> None:
        super().__init__(worker)
        self.experts = ExpertLayouts()
        self._weights_slept = self._graphs_dropped = False

    def sleep_refusal(self, level: int) -> str | None:
        """Refuse level 2 if weights cannot be loaded again in place."""
        name = self._in_nz_format() if level == 2 else None
        if name is None:
            return None
        return (
            f"weights in FRACTAL_NZ format ({name}) cannot be loaded again in place, which level 2 "
            "needs; use level 1, or start with VLLM_ASCEND_ENABLE_NZ=0"
        )

    def before_sleep(self) -> None:
        self.experts.close()
        for handle in self._worker._pp_send_work:
            handle.wait()
        self._worker._pp_send_work = []

    def after_sleep(self) -> None:
        """Drop captured graphs, if vllm-ascend's extra clean-up is on. This cannot be rolled back,
        so it happens after every rank sleeps. HCCL's clean-up is part of our transaction."""
        self._weights_slept = True
        worker = self._worker
        cleans_up = SleepModeConfig.cleans_up_extra(worker.vllm_config)
        if cleans_up and worker.model_runner.use_aclgraph and not self._graphs_dropped:
            self._graphs_dropped = True
            worker.sleep_wakeup_manager.acl_graph.sleep()
            gc.collect()
            torch_npu.npu.empty_cache()

    def after_wake(self) -> None:
        """Make the model usable. Capturing graphs cannot be rolled back, so it follows the wake. If
        it fails on one rank, every rank repeats it."""
        if not (self._weights_slept or self._graphs_dropped):
            return
        self._worker.operations.together("the end of a wake", self._make_usable)
        backend = self._worker.sleep_mode_backend
        awake = not backend.asleep("weights")
        if awake:
            self._weights_slept = False
        if awake and not backend.asleep("kv_cache"):
            self._graphs_dropped = False

    def _make_usable(self) -> None:
        worker = self._worker
        backend, manager = worker.sleep_mode_backend, worker.sleep_wakeup_manager
        if SleepModeConfig.releases_communicators(worker.vllm_config):
            with set_current_vllm_config(worker.vllm_config):
                manager.hccl.refresh_moe_hccl_groups()  # they refer to communicators by name
        if backend.asleep("weights"):
            return
        if self._graphs_dropped and not backend.asleep("kv_cache"):
            self.experts.close()  # capturing runs the model
            manager.acl_graph.sleep()  # drops what an earlier attempt captured
            manager.acl_graph.wakeup()
        as_loaded = worker.vllm_config.quant_config is None and not backend.reloads_after_level_2
        if self._weights_slept and as_loaded:
            hidden_size = worker.model_config.hf_text_config.hidden_size
            self.experts.open(worker.model_runner.model, hidden_size)

    def preserved_parameters(self) -> list[str]:
        # vLLM 0.23 has no option for this.
        return SleepModeConfig.from_vllm_config(self._worker.vllm_config).preserve_parameters

    def check_reload(self) -> None:
        """
        Raises:
            SleepModeError: weights are in FRACTAL_NZ format.
        """
        name = self._in_nz_format()
        if name is not None:
            raise SleepModeError(
                f"weights in FRACTAL_NZ format ({name}) cannot be loaded again in place; start "
                "with VLLM_ASCEND_ENABLE_NZ=0"
            )

    def check_draft_reload(self) -> None:
        """
        Raises:
            SleepModeError: always, because vLLM 0.23 loads a draft model only once.
        """
        raise SleepModeError("a draft model cannot be loaded again; restart the engine")

    def image_refusal(self) -> str | None:
        return NO_IMAGES

    def can_copy_back(self) -> bool:
        """Copying FRACTAL_NZ weights out and back changes their format."""
        return self._in_nz_format() is None

    def _in_nz_format(self) -> str | None:
        """The name of a parameter in a tiled format, if there is one."""
        parameters = self._worker.rank_weights.content.parameters().items()
        return next((name for name, parameter in parameters if is_tiled(parameter)), None)
