# SPDX-License-Identifier: Apache-2.0
"""The worker's part of sleep and wake: what must survive level 2, and what a rank reports."""

import fnmatch
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property, partial, wraps
from types import MappingProxyType
from typing import Any

import torch
import torch_npu
from vllm.logger import init_logger

from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import SleepModeError, WeightsError
from vllm_sleep_ascend.memory.account import describe, held_bytes, resident_bytes
from vllm_sleep_ascend.memory.device_wait import wait_for_device
from vllm_sleep_ascend.policy import (
    DEFERRABLE_TAGS,
    NEEDS,
    NEEDS_WEIGHTS,
    POLICY,
    STEP_CALLS,
    check_level,
)
from vllm_sleep_ascend.rank.guarded_calls import asleep_error
from vllm_sleep_ascend.rank.operations import TransactingWorker
from vllm_sleep_ascend.rank.saved import SavedContent
from vllm_sleep_ascend.rank.weights.content import DRAFT
from vllm_sleep_ascend.rank.weights.source_worker import SourceWorker
from vllm_sleep_ascend.status import RankStatus, in_no_checkpoint

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30


def needs_weights_awake(cls: type) -> type:
    """Class decorator: have methods that use weights refuse to touch them while they sleep, and
    tell the allocator of the steps of the model."""

    def refusing(name: str, stock: Callable) -> Callable:
        @wraps(stock)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.model_config.enable_sleep_mode:
                asleep = [tag for tag in NEEDS[name] if self.sleep_mode_backend.asleep(tag)]
                if asleep:
                    raise asleep_error(self, name, asleep)
            return stock(self, *args, **kwargs)

        return call

    def telling(stock: Callable) -> Callable:
        @wraps(stock)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
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


class SleepingWorker(SourceWorker, TransactingWorker):
    """Mixin for vLLM's ``Worker``: sleep, wake and status as one transaction each."""

    _wake_unfinished = False
    _weights_lost = False  # discarded since they were last awake
    _not_saved: Mapping[str, torch.Tensor] = MappingProxyType({})  # what a discard loses

    @cached_property
    def _saved(self) -> SavedContent:
        return SavedContent(self.sleep_mode_backend)

    def shutdown(self) -> None:
        """End the worker, and give device memory back while the process still has a device."""
        worker: Any = self
        super().shutdown()
        if worker.model_config.enable_sleep_mode:
            from vllm_sleep_ascend.memory.pool import release_pools

            release_pools()

    def sleep_refusal(self, level: int) -> str | None:
        """Why this rank cannot sleep at this level; None if it can."""
        worker: Any = self
        if worker._weight_update_active:
            return "a weight update is under way; call finish_weight_update first"
        return None

    def sleep(self, level: int = 1) -> None:
        """Free this rank's device memory, if every rank of the engine can.

        Level 1 keeps the weights in host memory; level 2 forgets them and keeps the model's buffers
        and the parameters that match ``sleep_preserve_parameter_names``.

        Raises:
            ValueError: the level does not exist.
            SleepModeError: it failed; memory is mapped as it was before on every rank, that of the
                KV cache perhaps without its content.
        """
        worker: Any = self
        if check_level(level) == 0:
            return
        held_before = 0

        def prepare() -> None:
            nonlocal held_before
            reason = self.sleep_refusal(level)
            if reason is not None:
                raise SleepModeError(f"sleep refused: {reason}")
            self._before_sleep()
            wait_for_device()
            held_before = held_bytes(worker.device)
            # Buffers are in no checkpoint: if the backup changes, only a copy brings them back.
            if (level == 2 or self.sleep_mode_backend.verifies) and not self._saved.saved:
                self._save_for_level_2()
            self.sleep_mode_backend.suspend(level)

        try:
            self._together(
                f"sleep level {level}",
                prepare,
                communicators="release",
                actions=POLICY[level],
            )
        finally:
            self._note_discarded_weights()
        self._after_sleep()
        backend = self.sleep_mode_backend
        with suppress(RuntimeError):  # it is done: a figure for the log may not make it an error
            free, total = torch_npu.npu.mem_get_info()
            components = backend.component_bytes(worker.device.index)
            logger.info(
                "Sleep level %d: this process gave back %.2f GiB of device memory; %.2f GiB of "
                "%.2f GiB are in use on the device, by all processes. Still held by this one: %s.",
                level,
                (held_before - held_bytes(worker.device)) / _GIB,
                (total - free) / _GIB,
                total / _GIB,
                describe(resident_bytes(components, backend.usage())),
            )

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Bring memory back: of these tags and of all that cannot be deferred, or all.

        Raises:
            SleepModeError: it failed; what slept still sleeps, and the call can be repeated. Or it
                would load a checkpoint in place of weights that came from elsewhere.
            WeightsError: as that, where there are several ranks. A single one is awake, and serves
                once the weights are loaded.
        """
        changed: list[WeightsError] = []

        def resume() -> None:
            if self.sleep_mode_backend.reloads_after_level_2 and self._missing():
                self._refuse_another_source(tags)
            try:
                self.sleep_mode_backend.resume(tags)
            except WeightsError as error:
                if self.agreement.size > 1:
                    raise
                changed.append(error)
            # From here memory is awake, but not all that belongs to a wake is done.
            self._wake_unfinished = True

        def finish() -> None:
            self.communicators.restore()
            awake = not self.sleep_mode_backend.asleep("weights")
            if awake:
                self._saved.restore()
                if self._weights_lost:
                    self._content.mark()
            if changed:
                spoilt = self._not_saved if awake else ()
                self._content.found_corrupt(spoilt, changed[0].beyond_loading)
            elif awake and self.sleep_mode_backend.reloads_after_level_2 and self._missing():
                self._reload_or_sleep_again()
            wait_for_device()

        was_unfinished, knowledge = self._wake_unfinished, self._content.knowledge()
        try:
            self._together("wake", resume, finish, communicators="restore")
        except Exception:
            if self.agreement.size > 1:  # it was taken back, with what was loaded
                self._wake_unfinished = was_unfinished
                self._content.know(knowledge)
            raise
        self._after_wake()
        self._wake_unfinished = False
        if not self.sleep_mode_backend.asleep("weights"):
            self._weights_lost = False
            self._saved.forget()
        if changed:
            self._note_failure("wake", changed[0])
            raise changed[0]

    def synchronize_device(self) -> None:
        """Called by vLLM before a sleep. It waits no longer than ``device_timeout_s``, and an error
        names the rank."""
        worker: Any = self
        wait = wait_for_device
        if not worker.model_config.enable_sleep_mode:
            wait = super().synchronize_device  # type: ignore[misc]
        try:
            wait()
        except RuntimeError as error:
            where = f"rank {worker.rank}, device {worker.device.index}"
            error.args = (f"{where}: {error}",)
            if self.agreement.size > 1:
                write_type(error)
            raise

    def discard(self, tags: tuple[str, ...]) -> None:
        """Free the device memory of these tags and forget its content."""

        def prepare() -> None:
            wait_for_device()
            self.sleep_mode_backend.discard(tags)

        self._together(f"discard {', '.join(tags)}", prepare)
        self._note_discarded_weights()

    def sleeping_tags(self) -> set[str]:
        """Those of vLLM's tags whose memory sleeps on this rank, or whose wake is not finished."""
        if self._wake_unfinished:
            return set(DEFERRABLE_TAGS)
        tags = {tag for tag in DEFERRABLE_TAGS if self.sleep_mode_backend.asleep(tag)}
        if not tags and self.sleep_mode_backend.state() == "SUSPENDED":
            return {"weights"}  # other memory could not be mapped again, and any wake does it
        return tags

    def sleep_status(self) -> RankStatus:
        """What this rank holds: bytes by tag and state, the last operation and the last error."""
        worker: Any = self
        free, total = torch_npu.npu.mem_get_info()
        status: RankStatus = {
            "rank": worker.rank,
            "engine": worker.parallel_config.data_parallel_index,
            "device": worker.device.index,
            "free": free,
            "total": total,
            "enabled": worker.model_config.enable_sleep_mode,
        }
        if not status["enabled"]:
            return status
        backend = self.sleep_mode_backend
        tags = backend.usage()
        return {
            **status,
            "state": backend.state(),
            "tags": tags,
            "resident": resident_bytes(backend.component_bytes(worker.device.index), tags),
            "host_backup": sum(tag["host"] for tag in tags.values()),
            "host_memory": backend.host_memory(),
            "parameters_without_content": len(self._missing()),
            "weights": self.weights_status(),
            "last_operation": backend.last_operation,
            "last_error": self._last_error,
        }

    def _before_sleep(self) -> None:
        """What has to be done, or refused, before memory is touched. Part of the transaction."""

    def _after_sleep(self) -> None:
        """What else comes free, once every rank sleeps."""

    def _after_wake(self) -> None:
        """What else comes back, once every rank has its memory. If it fails, the engine counts as
        asleep, and the wake can be repeated."""

    def _note_discarded_weights(self) -> None:
        if "discarded" in self.sleep_mode_backend.states("weights"):
            self._weights_lost = True
            self._content.lose(self._not_saved)
            self._source.discarded()
        elif not self._wake_unfinished and not self.sleep_mode_backend.asleep("weights"):
            self._saved.forget()

    def _reload_or_sleep_again(self) -> None:
        worker: Any = self
        if worker._weight_update_active or in_no_checkpoint(self.weights_status()):
            return
        try:
            self._reload_all()
        except SleepModeError as error:
            self.sleep_mode_backend.discard(("weights",))
            self._note_discarded_weights()
            raise SleepModeError(
                f"wake failed: {error}. The weights sleep again, and the wake can be repeated"
            ) from error

    def _preserved_names(self) -> list[str]:
        """Patterns of the parameters that level 2 keeps. A draft model is small, and what a trainer
        sends seldom has it."""
        worker: Any = self
        return [f"{DRAFT}*", *worker.model_config.sleep_preserve_parameter_names]

    def _save_for_level_2(self) -> None:
        """
        Raises:
            ValueError: a pattern matches no parameter.
        """
        parameters = self._content.parameters()
        preserved: set[str] = set()
        for pattern in self._preserved_names():
            matches = fnmatch.filter(parameters, pattern)
            if not matches and not pattern.startswith(DRAFT):
                raise ValueError(
                    f"sleep_preserve_parameter_names: {pattern!r} matches no parameter"
                )
            preserved.update(matches)
        ranges = self.sleep_mode_backend.ranges("weights")
        self._not_saved = {
            name: parameter
            for name, parameter in parameters.items()
            if name not in preserved
            and any(start <= parameter.data_ptr() < start + size for start, size in ranges)
        }
        self._saved.save(self._not_saved.values())
