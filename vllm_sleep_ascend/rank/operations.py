# SPDX-License-Identifier: Apache-2.0
"""How a worker does an operation: with the other ranks of its engine, or alone."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch_npu

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.memory.account import communicator_bytes
from vllm_sleep_ascend.memory.device_wait import is_running, wait_for_device
from vllm_sleep_ascend.policy import Action
from vllm_sleep_ascend.rank.agreement import Agreement, Operation
from vllm_sleep_ascend.rank.communicators import Communicators, trouble_of
from vllm_sleep_ascend.rank.host_budget import check_together, host_need
from vllm_sleep_ascend.status import LastError

if TYPE_CHECKING:
    from vllm_sleep_ascend.memory.backend import CamemBackend

Fate = Literal["keep", "release", "restore"]


class TransactingWorker:
    """Mixin for vLLM's ``Worker``."""

    sleep_mode_backend: "CamemBackend"
    agreement: Agreement
    communicators: Communicators
    _last_error: LastError | None = None

    def _join_ranks(self) -> None:
        """From here on operate together with the other ranks of the engine, which have met."""
        worker: Any = self
        device, ranks = worker.device.index, worker.parallel_config.world_size
        timeout_s = SleepModeConfig.slowest_rank_s(worker.vllm_config)
        self.agreement = Agreement(worker.rank, ranks, device, timeout_s)
        if not worker.model_config.enable_sleep_mode:
            return
        backend = self.sleep_mode_backend
        held_bytes = partial(communicator_bytes, backend, device)
        self.communicators = Communicators(held_bytes, self.agreement.members)
        backend.commits_at_once = ranks == 1

    def _together(
        self,
        name: str,
        *steps: Callable[[], None],
        communicators: Fate = "keep",
        actions: Mapping[str, Action] | None = None,
    ) -> None:
        """Do it on every rank of the engine or on none. An error says whose it is, and is kept for
        the status until the next success.

        ``communicators``: "release" frees their memory at the end, if an option wants it;
        "restore": one of the steps makes them again. ``actions``: of a sleep, so that the host
        memory of all ranks is looked at before it starts.
        """
        worker: Any = self
        try:
            if self.agreement.size > 1:
                self.agreement.carry_out(self._operation(name, steps, communicators, actions))
            else:
                for step in steps:
                    step()
        except Exception as error:
            self._note_failure(name, error)
            with suppress(RuntimeError):
                # A call that failed may have kept torch from coming back from another device.
                torch_npu.npu.set_device(worker.device)
            if self.agreement.size > 1:
                write_type(error)
            elif isinstance(error, RuntimeError):
                error.args = (f"rank {worker.rank}: {error}",)
            raise
        self._last_error = None

    def _note_failure(self, name: str, error: Exception) -> None:
        self._last_error = {"operation": name, "type": type(error).__name__, "message": str(error)}

    def _operation(
        self,
        name: str,
        steps: tuple[Callable, ...],
        fate: Fate,
        actions: Mapping[str, Action] | None,
    ) -> Operation:
        worker: Any = self
        backend, communicators = self.sleep_mode_backend, self.communicators
        if fate == "release" and backend.state() == "RUNNING":
            communicators.forget()  # of a sleep that was taken back without the other ranks
        release = fate == "release" and not communicators.released
        if release and SleepModeConfig.releases_communicators(worker.vllm_config):
            steps = (*steps, communicators.release)
        else:
            release = False

        def commit() -> None:
            backend.commit()
            if fate == "restore":
                communicators.forget()

        def abort() -> str:
            try:
                torch_npu.npu.set_device(worker.device)
                wait_for_device()
            except RuntimeError as error:
                if is_running(error):  # on what would be unmapped: the next operation takes it back
                    return str(error)
            trouble = backend.abort()
            if not release:
                trouble = "; ".join(filter(None, (trouble, trouble_of(communicators.destroy))))
            return trouble

        operation = Operation(name, steps, commit, abort)
        if release:
            rebuild = partial(communicators.rebuild, self.agreement)
            operation = replace(operation, abort_together=rebuild)
        if actions is not None:
            facts = partial(host_need, backend, worker.rank, actions)
            operation = replace(operation, facts=facts, judge=check_together)
        return operation
