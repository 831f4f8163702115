# SPDX-License-Identifier: Apache-2.0
"""Pauses of the scheduler: the user's own, which outlives a sleep, and that of a sleep, which can
be called off while it waits for requests."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from vllm.v1.core.sched.interface import PauseState

from vllm_sleep_ascend.engine.serving_gate import ServingGate, is_pending
from vllm_sleep_ascend.errors import SleepModeError


@contextmanager
def pausing_to_sleep(core: Any) -> Iterator[None]:
    """A pause in here belongs to a sleep, and ends with it."""
    core.pauses_to_sleep = True
    try:
        yield
    finally:
        core.pauses_to_sleep = False


def call_off_sleep(core: Any, by: str) -> None:
    """End the sleeps that wait for requests to end; their callers get a SleepModeError."""
    while is_pending(core) and (wait := getattr(core, "wait_before_sleep", None)) is not None:
        core.wait_before_sleep = None
        wait.call_off(
            SleepModeError(
                f"{by} called the sleep off while it waited for requests to end. Nothing sleeps "
                "and no request is lost; call sleep() again, or with mode='abort'"
            )
        )


class _Wait:
    """The part of a sleep in mode "wait" before any memory moves.

    Attributes:
        done: what the sleep goes by, in place of vLLM's future, which nobody can cancel.
    """

    def __init__(self, core: Any, pause: Callable[[], Future | None]) -> None:
        before = list(core._idle_state_callbacks)
        self._idle = pause()
        self._core = core
        # What vLLM would do once the engine is idle: caches are emptied for the sleep.
        self._callbacks = [call for call in core._idle_state_callbacks if call not in before]
        self.done: Future = Future()
        if self._idle is not None:
            self._idle.add_done_callback(self._end)

    @property
    def is_over(self) -> bool:
        return self._idle is None

    def call_off(self, error: Exception) -> None:
        waiting = self._core._idle_state_callbacks
        waiting[:] = [call for call in waiting if call not in self._callbacks]
        self.done.set_exception(error)

    def _end(self, idle: Future) -> None:
        self._core.wait_before_sleep = None
        error = idle.exception()
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def pause_scheduler(stock: Callable) -> Callable:
    def pause_scheduler(self: Any, mode: str = "abort", clear_cache: bool = True) -> Future | None:
        if not getattr(self, "pauses_to_sleep", False):
            result = stock(self, mode, clear_cache)
            gate = ServingGate.of(self)
            if gate is not None:
                gate.paused_by_user(self.scheduler.pause_state)
            return result
        # Engines that take every step together (a mixture of experts) pause together, for good.
        if mode != "wait" or not hasattr(self, "_idle_state_callbacks") or _in_step(self):
            return stock(self, mode, clear_cache)
        wait = _Wait(self, lambda: stock(self, mode, clear_cache))
        if wait.is_over:
            return None
        self.wait_before_sleep = wait
        return wait.done

    return pause_scheduler


def _in_step(core: Any) -> bool:
    return hasattr(core, "pending_pause")


def draining(stock: Callable) -> Callable:
    """ "wait" in the caller's process, where nobody else steps the engine."""

    def pause_scheduler(self: Any, mode: str = "abort", clear_cache: bool = True) -> Future | None:
        if mode == "wait":
            _drain(self)
            mode = "keep"  # what was queued stays queued
        return stock(self, mode, clear_cache)

    return pause_scheduler


def _drain(core: Any) -> None:
    """Step until the requests under way have ended. Their outputs wait for ``get_output``."""
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    while core.scheduler.has_requests() or core.batch_queue:
        outputs, executed = core.step_fn()
        core.post_step(executed)
        if outputs and 0 in outputs:
            undelivered(core).append(outputs[0])
        if not executed:
            time.sleep(0.001)  # as vLLM's own loop: a transfer of KV blocks may be under way


def undelivered(core: Any) -> deque:
    """Outputs of an engine in the caller's process that nobody has asked for yet."""
    if not hasattr(core, "undelivered_outputs"):
        core.undelivered_outputs = deque()
    return core.undelivered_outputs


def sleep_in_process(self: Any, level: int = 1, mode: str = "abort") -> None:
    result = self.engine_core.sleep(level, mode)
    assert result is None


def get_output(stock: Callable) -> Callable:
    def get_output(self: Any) -> Any:
        waiting = undelivered(self.engine_core)
        return waiting.popleft() if waiting else stock(self)

    return get_output
