# SPDX-License-Identifier: Apache-2.0
"""A rank's part of sleep and wake: what must survive level 2, and what the rank reports."""

import fnmatch
import math
from collections.abc import Mapping
from contextlib import suppress

import torch
import torch_npu
from vllm.logger import init_logger

from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import SleepModeError, WeightsError
from vllm_sleep_ascend.memory.account import describe, held_bytes, resident_bytes
from vllm_sleep_ascend.memory.device_wait import wait_for_device
from vllm_sleep_ascend.policy import DEFERRABLE_TAGS, POLICY, Place, check_level, check_place
from vllm_sleep_ascend.rank.hooks import Hooks
from vllm_sleep_ascend.rank.host_worker import HostWorker
from vllm_sleep_ascend.rank.operations import Operations
from vllm_sleep_ascend.rank.saved import SavedContent
from vllm_sleep_ascend.rank.weights.content import DRAFT
from vllm_sleep_ascend.rank.weights.rank_weights import RankWeights
from vllm_sleep_ascend.status import RankStatus, in_no_checkpoint

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30


class SleepMode:
    """Sleep and wake of one rank's memory, each a transaction of all ranks of the engine."""

    def __init__(
        self, worker: HostWorker, operations: Operations, weights: RankWeights, hooks: Hooks
    ) -> None:
        self._worker, self._operations = worker, operations
        self._weights, self._hooks = weights, hooks
        self._backend = worker.sleep_mode_backend
        self._saved = SavedContent(self._backend)
        self._not_saved: Mapping[str, torch.Tensor] = {}  # what a discard loses
        self._weights_lost = False  # discarded since they were last awake
        self._wake_unfinished = False
        self._kv_unregistered = False  # by the KV connector

    def refusal(self, level: int) -> str | None:
        """Why this rank cannot sleep at this level; None if it can."""
        reason = self._hooks.sleep_refusal(level)
        if reason is None and self._weights.updating:
            reason = "a weight update is under way; call finish_weight_update first"
        return reason

    def sleep(self, level: int, place: Place | None = None) -> None:
        """Free this rank's device memory, if every rank of the engine can.

        Level 1 keeps the weights in host memory or on disk; level 2 forgets them and keeps the
        model's buffers and the parameters that match ``sleep_preserve_parameter_names``.

        Args:
            place: where backups go, also those of memory that sleeps already; None: where the
                options say, and what sleeps stays where it is.

        Raises:
            ValueError: the level or the place does not exist.
            SleepModeError: it failed; memory is mapped as it was before on every rank, that of the
                KV cache perhaps without its content. Or a place is named, and level 2 has discarded
                the weights.
        """
        if check_level(level) == 0:
            return
        self._backend.check_place(check_place(place, level))
        device, held_before = self._worker.device, 0

        def prepare() -> None:
            nonlocal held_before
            reason = self.refusal(level)
            if place is not None and "discarded" in self._backend.states("weights"):
                reason = "the weights were discarded (level 2), and have no backup; wake them first"
            if reason is not None:
                raise SleepModeError(f"sleep refused: {reason}")
            self._hooks.before_sleep()
            wait_for_device()
            held_before = held_bytes(device)
            # Buffers are in no checkpoint: if the backup changes, only a copy brings them back.
            if (level == 2 or self._backend.verifies(place)) and not self._saved.saved:
                self._save_for_level_2()
            self._unregister_kv()
            self._backend.suspend(level, place)

        try:
            self._operations.together(
                f"sleep level {level}",
                prepare,
                communicators="release",
                actions=POLICY[level],
                place=place,
            )
        except Exception as error:
            self._register_kv_after(error)
            raise
        finally:
            self._note_discarded_weights()
        self._hooks.after_sleep()
        with suppress(RuntimeError):  # it is done: a figure for the log may not make it an error
            free, total = torch_npu.npu.mem_get_info()
            logger.info(
                "Sleep level %d: this process gave back %.2f GiB of device memory; %.2f GiB of "
                "%.2f GiB are in use on the device, by all processes. Still held by this one: %s.",
                level,
                (held_before - held_bytes(device)) / _GIB,
                (total - free) / _GIB,
                total / _GIB,
                describe(resident_bytes(device, self._backend.usage())),
            )

    def wake_up(self, tags: list[str] | None) -> None:
        """Bring memory back: of these tags and of all that cannot be deferred, or all.

        Raises:
            SleepModeError: it failed; what slept still sleeps, and the call can be repeated. Or it
                would load a checkpoint in place of weights that came from elsewhere.
            WeightsError: as that, where there are several ranks. A single one is awake, and serves
                once the weights are loaded.
        """
        content = self._weights.content
        changed: list[WeightsError] = []

        def resume() -> None:
            if self._reloads():
                self._refuse_another_source(tags)
            try:
                self._backend.resume(tags)
            except WeightsError as error:
                if not self._operations.alone:
                    raise
                changed.append(error)
            # From here memory is awake, but not all that belongs to a wake is done.
            self._wake_unfinished = True

        def finish() -> None:
            awake = not self._backend.asleep("weights")
            if self._backend.reloads_after_level_2:
                self._weights.open_for_wake(awake and (self._weights_lost or self._reloads()))
            self._operations.communicators.restore()
            if awake:
                self._saved.restore()
                if self._weights_lost:
                    content.mark()
            if changed:
                spoilt = self._not_saved if awake else ()
                content.found_corrupt(spoilt, changed[0].beyond_loading)
            elif awake and self._reloads():
                self._reload_or_sleep_again()
            wait_for_device()

        was_unfinished, snapshot = self._wake_unfinished, content.snapshot()
        try:
            self._operations.together("wake", resume, finish, communicators="restore")
        except Exception:
            if not self._operations.alone:  # it was rolled back, with what was loaded
                self._wake_unfinished = was_unfinished
                content.restore(snapshot)
            raise
        self._hooks.after_wake()
        self._register_kv_again()
        self._wake_unfinished = False
        if not self._backend.asleep("weights"):
            self._weights_lost = False
            self._saved.forget()
        if changed:
            self._operations.note_failure("wake", changed[0])
            raise changed[0]

    def discard(self, tags: tuple[str, ...]) -> None:
        """Free the device memory of these tags and forget its content."""

        def prepare() -> None:
            wait_for_device()
            if "kv_cache" in tags:
                self._unregister_kv()
            self._backend.discard(tags)

        try:
            self._operations.together(f"discard {', '.join(tags)}", prepare)
        except Exception as error:
            self._register_kv_after(error)
            raise
        self._note_discarded_weights()

    def _unregister_kv(self) -> None:
        """Have the KV connector release what it registered of the KV cache's memory."""
        self._kv_unregistered = True
        _tell_connector("unregister_kv_caches")

    def _register_kv_again(self) -> None:
        """Have it register the memory again, if that is awake. If this fails, the engine counts as
        asleep, and a wake retries.

        Raises:
            SleepModeError: the connector failed.
        """
        if not self._kv_unregistered or self._backend.asleep("kv_cache"):
            return
        was_unfinished, self._wake_unfinished = self._wake_unfinished, True
        try:
            _tell_connector("restore_kv_caches")
        except Exception as error:
            failure = SleepModeError(
                f"rank {self._worker.rank}: the KV connector cannot register the KV cache's memory "
                f"again: {type(error).__name__}: {error}; repeat the wake"
            )
            self._operations.note_failure("wake", failure)
            write_type(failure)
            raise failure from error
        self._kv_unregistered, self._wake_unfinished = False, was_unfinished

    def _register_kv_after(self, error: Exception) -> None:
        """As ``_register_kv_again``, without hiding the error that came before."""
        try:
            self._register_kv_again()
        except SleepModeError as trouble:
            error.args = (f"{error}; {trouble}",)

    def sleeping_tags(self) -> set[str]:
        """Those of vLLM's tags whose memory sleeps on this rank, or whose wake is not finished."""
        if self._wake_unfinished:
            return set(DEFERRABLE_TAGS)
        tags = {tag for tag in DEFERRABLE_TAGS if self._backend.asleep(tag)}
        if not tags and self._backend.state() == "SUSPENDED":
            return {"weights"}  # other memory could not be mapped again, and any wake does it
        return tags

    def status(self) -> RankStatus:
        """What this rank holds: bytes by tag and state, the last operation and the last error."""
        worker, backend = self._worker, self._backend
        tags = backend.usage()
        return {
            **status_without_sleep_mode(worker),
            "state": backend.state(),
            "tags": tags,
            "resident": resident_bytes(worker.device, tags),
            "host_backup": sum(tag["host"] for tag in tags.values()),
            "backups": {
                "host": sum(tag["asleep_in_host"] for tag in tags.values()),
                "disk": sum(tag["asleep_on_disk"] for tag in tags.values()),
            },
            "host_memory": backend.host_memory(),
            "disk_backup": backend.disk_backup(),
            "parameters_without_content": len(self._weights.content.missing()),
            "weights": self._weights.origin(),
            "last_operation": backend.last_operation,
            "last_error": self._operations.last_error,
        }

    def _note_discarded_weights(self) -> None:
        if "discarded" in self._backend.states("weights"):
            self._weights_lost = True
            self._weights.discarded(self._not_saved)
        elif not self._wake_unfinished and not self._backend.asleep("weights"):
            self._saved.forget()

    def _reloads(self) -> bool:
        """Whether a wake has to load the weights."""
        return self._backend.reloads_after_level_2 and bool(self._weights.content.missing())

    def _refuse_another_source(self, tags: list[str] | None) -> None:
        """In a wake that reloads what was discarded. One of the weights alone is the way to load
        them by other means, and reloads nothing.

        Raises:
            SleepModeError: a checkpoint would be served in place of weights that came from
                elsewhere.
        """
        weights_alone = tags is not None and {*tags}.intersection(DEFERRABLE_TAGS) == {"weights"}
        lost = in_no_checkpoint(self._weights.origin())
        if lost is None or weights_alone or self._weights.updating:
            return
        if tags is None or "weights" in tags or not self._backend.asleep("weights"):
            raise SleepModeError(
                f"wake refused: {lost} are lost, and after_level2='reload' would serve "
                f"{self._weights.reloads_from} in their place. Wake the tag weights alone, "
                "load them again by a weight update, or a checkpoint by "
                "collective_rpc('reload_weights'), and then wake the rest. Nothing has changed"
            )

    def _reload_or_sleep_again(self) -> None:
        if self._weights.updating or in_no_checkpoint(self._weights.origin()):
            return
        try:
            self._weights.reload_in_wake()
        except SleepModeError as error:
            self._backend.discard(("weights",))
            self._note_discarded_weights()
            raise SleepModeError(
                f"wake failed: {error}. The weights sleep again, and the wake can be repeated"
            ) from error

    def _save_for_level_2(self) -> None:
        """
        Raises:
            ValueError: a pattern matches no parameter.
        """
        parameters = self._weights.content.parameters()
        preserved: set[str] = set()
        # A draft model is small, and what a trainer sends seldom has it.
        for pattern in (f"{DRAFT}*", *self._hooks.preserved_parameters()):
            matches = fnmatch.filter(parameters, pattern)
            if not matches and not pattern.startswith(DRAFT):
                raise ValueError(
                    f"sleep_preserve_parameter_names: {pattern!r} matches no parameter"
                )
            preserved.update(matches)
        ranges = self._backend.ranges("weights")
        self._not_saved = {
            name: parameter
            for name, parameter in parameters.items()
            if name not in preserved
            and any(start <= parameter.data_ptr() < start + size for start, size in ranges)
        }
        self._saved.save(self._not_saved.values())


def _tell_connector(method: str) -> None:
    """Have a KV connector unregister the KV cache, or register it again.
    Repeating either changes nothing. Connectors of vLLM 0.32 register nothing with sleep mode."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if has_kv_transfer_group():
        call = getattr(get_kv_transfer_group(), method, None)
        if call is not None:
            call()


def status_without_sleep_mode(worker: HostWorker) -> RankStatus:
    """What every rank can tell."""
    free, total = torch_npu.npu.mem_get_info()
    return {
        "rank": worker.rank,
        "engine": worker.parallel_config.data_parallel_index,
        "device": worker.device.index,
        "free": free,
        "total": total,
        "held": held_bytes(worker.device),
        "share": math.ceil(total * worker.cache_config.gpu_memory_utilization),
        "enabled": worker.model_config.enable_sleep_mode,
    }
