# SPDX-License-Identifier: Apache-2.0
"""The worker's part of sleep and wake: what must survive level 2, and what a rank reports."""

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed.parallel_state import resume_device_comms, suspend_device_comms
from vllm.logger import init_logger

from vllm_sleep_ascend.policy import DEFERRABLE_TAGS, check_level

if TYPE_CHECKING:
    from vllm_sleep_ascend.backend import CamemBackend

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30


# What vLLM's worker does with weights: on sleeping memory each would fault the device.
_NEEDS_WEIGHTS = (
    "reload_weights",
    "reset_weights",
    "compute_weight_checksums",
    "save_sharded_state",
    "save_tensorized_model",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
    "add_lora",
)


def needs_weights_awake(cls: type) -> type:
    """Class decorator: have the methods above refuse to touch weights that sleep."""

    def refusing(name: str, stock: Callable) -> Callable:
        @wraps(stock)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.model_config.enable_sleep_mode and self.sleep_mode_backend.asleep("weights"):
                from vllm_sleep_ascend.errors import SleepModeError

                raise SleepModeError(
                    f"{name} needs the weights, which sleep; call wake_up(tags=['weights']) first"
                )
            return stock(self, *args, **kwargs)

        return call

    for name in _NEEDS_WEIGHTS:
        setattr(cls, name, refusing(name, getattr(cls, name)))
    return cls


class SleepingWorker:
    """Mixin for vLLM's ``Worker``: sleep, wake and status as one transaction each."""

    sleep_mode_backend: "CamemBackend"

    def sleep(self, level: int = 1) -> None:
        """Free this rank's device memory.

        Level 1 keeps the weights in host memory; level 2 forgets them and keeps the model's buffers
        and the parameters that match ``sleep_preserve_parameter_names``.

        Raises:
            ValueError: the level does not exist.
            SleepModeError: it failed; all memory is as it was before.
        """
        worker: Any = self
        if check_level(level) == 0:
            return
        torch.accelerator.synchronize()
        free_before, _ = torch.accelerator.get_memory_info()
        backend = self.sleep_mode_backend
        saves = level == 2 and "discarded" not in backend.states("weights")
        try:
            if saves:
                self._save_for_level_2()
            with self._named():
                backend.suspend(level)
        except BaseException:
            if saves:
                self._forget_saved()
            raise
        if worker.model_config.enable_nccl_comm_suspend:
            suspend_device_comms()
        free_after, total = torch.accelerator.get_memory_info()
        logger.info(
            "Sleep level %d: %.2f GiB of device memory came free; %.2f GiB of %.2f GiB are in use "
            "on the device, by all processes.",
            level,
            (free_after - free_before) / _GIB,
            (total - free_after) / _GIB,
            total / _GIB,
        )

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Bring memory back: of these tags and of all that cannot be deferred, or all.

        Raises:
            SleepModeError: it failed; what slept still sleeps, and the call can be repeated.
        """
        worker: Any = self
        with self._named():
            self.sleep_mode_backend.resume(tags)
        if worker.model_config.enable_nccl_comm_suspend:
            resume_device_comms()
        if not self.sleep_mode_backend.asleep("weights"):
            self._restore_saved()
        torch.accelerator.synchronize()

    def discard(self, tags: tuple[str, ...]) -> None:
        """Free the device memory of these tags and forget its content."""
        torch.accelerator.synchronize()
        with self._named():
            self.sleep_mode_backend.discard(tags)

    def sleeping_tags(self) -> set[str]:
        """Those of vLLM's tags whose memory sleeps on this rank."""
        return {tag for tag in DEFERRABLE_TAGS if self.sleep_mode_backend.asleep(tag)}

    def sleep_status(self) -> dict[str, Any]:
        """What this rank holds: bytes by tag and state, and the last operation."""
        worker: Any = self
        free, total = torch.accelerator.get_memory_info()
        status = {"rank": worker.rank, "device": worker.device.index, "free": free, "total": total}
        if not worker.model_config.enable_sleep_mode:
            return {**status, "enabled": False}
        backend = self.sleep_mode_backend
        return {
            **status,
            "enabled": True,
            "state": backend.state(),
            "tags": backend.usage(),
            "last_operation": backend.last_operation,
        }

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say in an error whose it is: of many ranks one may fail."""
        worker: Any = self
        try:
            yield
        except RuntimeError as error:
            error.args = (f"rank {worker.rank}: {error}",)
            raise

    def _models(self) -> dict[str, nn.Module]:
        worker: Any = self
        draft = worker.get_draft_model()
        models = {"": worker.model_runner.model}
        return models if draft is None else {**models, "draft.": draft}

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {
            prefix + name: buffer
            for prefix, model in self._models().items()
            for name, buffer in model.named_buffers()
        }

    def _preserved_parameters(self) -> dict[str, torch.Tensor]:
        worker: Any = self
        parameters = worker._get_sleep_parameters(worker.model_runner.model)
        names: set[str] = set()
        for pattern in worker.model_config.sleep_preserve_parameter_names:
            matches = fnmatch.filter(parameters, pattern)
            if not matches and pattern != "draft.*":
                raise ValueError(
                    f"sleep_preserve_parameter_names: {pattern!r} matches no parameter"
                )
            names.update(matches)
        return {name: parameters[name] for name in names}

    def _save_for_level_2(self) -> None:
        worker: Any = self
        host_copy = self.sleep_mode_backend.host_copy
        worker._sleep_saved_parameters = {
            name: host_copy(parameter) for name, parameter in self._preserved_parameters().items()
        }
        worker._sleep_saved_buffers = {
            name: host_copy(buffer) for name, buffer in self._buffers().items()
        }

    @torch.no_grad()
    def _restore_saved(self) -> None:
        worker: Any = self
        if worker._sleep_saved_parameters:
            parameters = worker._get_sleep_parameters(worker.model_runner.model)
            for name, saved in worker._sleep_saved_parameters.items():
                parameters[name].copy_(saved)
        buffers = self._buffers() if worker._sleep_saved_buffers else {}
        for name, saved in worker._sleep_saved_buffers.items():
            if name in buffers:
                buffers[name].data.copy_(saved)
        self._forget_saved()

    def _forget_saved(self) -> None:
        worker: Any = self
        worker._sleep_saved_parameters = {}
        worker._sleep_saved_buffers = {}
