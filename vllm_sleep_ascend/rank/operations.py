# SPDX-License-Identifier: Apache-2.0
"""How a rank does an operation on memory: with the other ranks of its engine, or alone."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal

import torch_npu

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.memory.account import communicator_bytes
from vllm_sleep_ascend.memory.device_wait import is_running, wait_for_device
from vllm_sleep_ascend.policy import Action, Place
from vllm_sleep_ascend.rank.agreement import Agreement, Operation
from vllm_sleep_ascend.rank.communicators import Communicators, trouble_of
from vllm_sleep_ascend.rank.host_budget import check_together, host_need
from vllm_sleep_ascend.rank.host_worker import HostWorker
from vllm_sleep_ascend.status import LastError

Fate = Literal["keep", "release", "restore"]


class Operations:
    """Operations of one rank of an engine with sleep mode, and the last one's error."""

    def __init__(self, worker: HostWorker, agreement: Agreement) -> None:
        self._worker, self._agreement = worker, agreement
        self._backend = worker.sleep_mode_backend
        self._backend.commits_at_once = self.alone
        held_bytes = partial(communicator_bytes, worker.device)
        self.communicators = Communicators(held_bytes, agreement.members)
        self.last_error: LastError | None = None

    @property
    def alone(self) -> bool:
        """Whether this rank is the only one of its engine."""
        return self._agreement.size == 1

    def together(
        self,
        name: str,
        *steps: Callable[[], None],
        communicators: Fate = "keep",
        actions: Mapping[str, Action] | None = None,
        place: Place | None = None,
    ) -> None:
        """Do it on every rank of the engine or on none. An error says whose it is, and is kept for
        the status until the next success.

        ``communicators``: "release" frees their memory at the end, if an option wants it;
        "restore": one of the steps makes them again. ``actions``: of a sleep, so that the host
        memory of all ranks is looked at before it starts, or their disk; ``place``: of its backups.
        """
        worker = self._worker
        try:
            if self.alone:
                for step in steps:
                    step()
            else:
                self._agreement.carry_out(
                    self._operation(name, steps, communicators, actions, place)
                )
        except Exception as error:
            self.note_failure(name, error)
            with suppress(RuntimeError):
                # A call that failed may have kept torch from coming back from another device.
                torch_npu.npu.set_device(worker.device)
            if not self.alone:
                write_type(error)
            elif isinstance(error, RuntimeError):
                error.args = (f"rank {worker.rank}: {error}",)
            raise
        self.last_error = None

    def note_failure(self, name: str, error: Exception) -> None:
        """Keep the error for the status."""
        self.last_error = {"operation": name, "type": type(error).__name__, "message": str(error)}

    def _operation(
        self,
        name: str,
        steps: tuple[Callable[[], None], ...],
        fate: Fate,
        actions: Mapping[str, Action] | None,
        place: Place | None,
    ) -> Operation:
        worker, backend, communicators = self._worker, self._backend, self.communicators
        if fate == "release" and backend.state() == "RUNNING":
            communicators.forget()  # of a sleep that was rolled back without the other ranks
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
                if is_running(error):  # on what would be unmapped: the next operation rolls it back
                    return str(error)
            trouble = backend.abort()
            if not release:
                trouble = "; ".join(filter(None, (trouble, trouble_of(communicators.destroy))))
            return trouble

        operation = Operation(name, steps, commit, abort)
        if release:
            rebuild = partial(communicators.rebuild, self._agreement)
            operation = replace(operation, abort_together=rebuild)
        if actions is not None:
            facts = partial(host_need, backend, worker.rank, actions, place)
            operation = replace(operation, facts=facts, judge=check_together)
        return operation
