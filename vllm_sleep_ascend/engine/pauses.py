# SPDX-License-Identifier: Apache-2.0
"""Pauses of the scheduler: the user's own, which outlives a sleep, and that of a sleep, which can
be called off while it waits for requests."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState

from vllm_sleep_ascend.engine.serving_gate import ServingGate
from vllm_sleep_ascend.engine.state import EngineState
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.policy import PauseMode

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient

_Pause = Callable[["EngineCore", PauseMode, bool], Future[None] | None]


@contextmanager
def pausing_to_sleep(core: "EngineCore") -> Iterator[None]:
    """A pause inside belongs to a sleep, and ends with it."""
    state = EngineState.of(core)
    state.pauses_to_sleep = True
    try:
        yield
    finally:
        state.pauses_to_sleep = False


def call_off_sleep(core: "EngineCore", by: str) -> None:
    """End the sleeps that wait for requests to end; their callers get a SleepModeError."""
    state = EngineState.of(core)
    while state.pending_sleep is not None and (wait := state.wait) is not None:
        state.wait = None
        wait.call_off(
            SleepModeError(
                f"{by} called the sleep off while it waited for requests to end. Nothing sleeps "
                "and no request is lost; call sleep() again, or with mode='abort'"
            )
        )


class WaitBeforeSleep:
    """The part of a sleep in mode "wait" before any memory moves.

    Attributes:
        done: the future that the sleep waits for; vLLM's own cannot be cancelled.
    """

    def __init__(self, core: "EngineCore", pause: Callable[[], Future[None] | None]) -> None:
        before = list(core._idle_state_callbacks)
        self._idle = pause()
        self._core = core
        # What vLLM would do once the engine is idle: caches are emptied for the sleep.
        self._callbacks = [call for call in core._idle_state_callbacks if call not in before]
        self.done: Future[None] = Future()
        if self._idle is not None:
            self._idle.add_done_callback(self._end)

    @property
    def is_over(self) -> bool:
        return self._idle is None

    def call_off(self, error: Exception) -> None:
        waiting = self._core._idle_state_callbacks
        waiting[:] = [call for call in waiting if call not in self._callbacks]
        self.done.set_exception(error)

    def _end(self, idle: Future[None]) -> None:
        EngineState.of(self._core).wait = None
        error = idle.exception()
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def pause_scheduler(stock: _Pause) -> _Pause:
    def pause_scheduler(
        self: "EngineCore", mode: PauseMode = "abort", clear_cache: bool = True
    ) -> Future[None] | None:
        state = EngineState.of(self)
        if not state.pauses_to_sleep:
            result = stock(self, mode, clear_cache)
            gate = ServingGate.of(self)
            if gate is not None:
                gate.paused_by_user(self.scheduler.pause_state)
            return result
        # Engines that take every step together (a mixture of experts) pause together, for good.
        if mode != "wait" or not hasattr(self, "_idle_state_callbacks") or _in_step(self):
            return stock(self, mode, clear_cache)
        wait = WaitBeforeSleep(self, lambda: stock(self, mode, clear_cache))
        if wait.is_over:
            return None
        state.wait = wait
        return wait.done

    return pause_scheduler


def still_rejecting(stock: Callable[["EngineCore"], None]) -> Callable[["EngineCore"], None]:
    """vLLM 0.33 rejects new requests while the user's pause is in modes "abort" and "wait". It
    would accept them after any resume, also one that is refused or belongs to a wake."""

    def resume_scheduler(self: "EngineCore") -> None:
        gate = ServingGate.of(self)
        rejects = getattr(self, "reject_new_requests", False)
        try:
            stock(self)
        finally:
            if rejects and gate is not None and gate.users_pause != PauseState.UNPAUSED:
                self.reject_new_requests = True  # type: ignore[attr-defined]

    return resume_scheduler


def _in_step(core: "EngineCore") -> bool:
    return hasattr(core, "pending_pause")


def draining(stock: _Pause) -> _Pause:
    """ "wait" in an in-process engine, which only the caller steps."""

    def pause_scheduler(
        self: "EngineCore", mode: PauseMode = "abort", clear_cache: bool = True
    ) -> Future[None] | None:
        if mode == "wait":
            _drain(self)
            mode = "keep"  # queued requests stay queued
        return stock(self, mode, clear_cache)

    return pause_scheduler


def _drain(core: "EngineCore") -> None:
    """Step until the running requests have ended. Their outputs wait for ``get_output``."""
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    while core.scheduler.has_requests() or core.batch_queue:
        outputs, executed = core.step_fn()
        core.post_step(executed)
        if outputs and 0 in outputs:
            EngineState.of(core).undelivered.append(outputs[0])
        if not executed:
            time.sleep(0.001)  # as in vLLM's own loop: KV blocks may be in transfer


def sleep_in_process(self: "InprocClient", level: int = 1, mode: PauseMode = "abort") -> None:
    result = self.engine_core.sleep(level, mode)
    assert result is None


def get_output(
    stock: Callable[["InprocClient"], "EngineCoreOutputs"],
) -> Callable[["InprocClient"], "EngineCoreOutputs"]:
    def get_output(self: "InprocClient") -> "EngineCoreOutputs":
        waiting = EngineState.of(self.engine_core).undelivered
        return waiting.popleft() if waiting else stock(self)

    return get_output
