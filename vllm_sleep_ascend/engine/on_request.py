# SPDX-License-Identifier: Apache-2.0
"""An engine that sleeps by itself when it is idle (``idle_sleep_s``), and that a request wakes
(``wake_on_request``).

The engine's own process decides, because it alone sees every request, whichever front end sends it,
in one order with the calls that put it to sleep.
"""

import time
from collections.abc import Callable, Sequence
from math import inf
from threading import Timer
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine.backups.to_disk import ToDisk
from vllm_sleep_ascend.engine.serving_gate import ServingGate
from vllm_sleep_ascend.engine.state import EngineState, come_by, is_pending, unfinished
from vllm_sleep_ascend.error_text import restored
from vllm_sleep_ascend.policy import PauseMode
from vllm_sleep_ascend.status import RankStatus, in_no_checkpoint, level_of

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

logger = init_logger(f"vllm.{__name__}")

_RETRY_S = 1.0
"""For so long after a wake that failed, requests get its error: it is that of all that waited."""

_MOST_DOUBLINGS = 6


class OnRequest:
    """Wakes an EngineCore for requests, and puts it to sleep when it is idle, as far as options ask
    for that.

    Attributes:
        sleeps_by_itself: it was idle, and its user has asked for no sleep or wake since, only
            perhaps for another place of its backup.
    """

    def __init__(self, core: "EngineCore") -> None:
        enabled = core.vllm_config.model_config.enable_sleep_mode
        config = (
            SleepModeConfig.from_vllm_config(core.vllm_config) if enabled else SleepModeConfig()
        )
        self._core = core
        self._config = config
        self._idle_s = inf if config.idle_sleep_s is None else config.idle_sleep_s
        self._failure = ""
        self._failed_at = 0.0
        self._came_meanwhile: list[str] = []  # while a sleep waited for others to end
        self._last_work = time.monotonic()
        self._failed_sleeps = 0
        self._timer: Timer | None = None
        self._falls_asleep = False
        self.sleeps_by_itself = False
        self._told = ""

    @classmethod
    def of(cls, core: "EngineCore") -> "OnRequest":
        """This engine's."""
        state = EngineState.of(core)
        if state.on_request is None:
            state.on_request = cls(core)
        return state.on_request

    def wake(self, request_id: str | None = None) -> str | None:
        """Wake the engine for a request, if its memory sleeps. Returns why that failed. An engine
        that its user has paused would not serve it, and sleeps on.

        Args:
            request_id: None if the request is still to come.
        """
        core = self._core
        gate = ServingGate.of(core)
        if not self._config.wake_on_request or gate is None:
            return None
        if gate.users_pause != PauseState.UNPAUSED:
            return None
        if is_pending(core):
            if request_id is not None:
                self._came_meanwhile.append(request_id)
            return None
        if not core.model_executor.sleeping_tags:
            return None
        if self._failure and time.monotonic() < self._failed_at + _RETRY_S:
            return self._failure
        self._failure = ""
        try:
            ranks: list[RankStatus] = core.model_executor.collective_rpc("sleep_status")
            if level_of(ranks) == 2 and self._config.after_level2 != "reload":
                return (
                    "the engine sleeps at level 2, which discarded its weights, and a request does "
                    f"not wake it with after_level2={self._config.after_level2!r}: wake it and "
                    "load its weights, or start it with after_level2='reload'"
                )
            logger.info("A request wakes the engine.")
            core.wake_up()
        except Exception as error:  # of whatever type a rank raised
            self._failure = f"the engine sleeps, and a request could not wake it: {restored(error)}"
            self._failed_at = time.monotonic()
            logger.warning("%s", self._failure)
        return self._failure or None

    def wake_after_sleep(self, mode: PauseMode) -> tuple[list[str], str | None]:
        """Wake an engine that a sleep has put to sleep over requests that wait for it: those that
        came during the sleep, and after mode "wait" all, as none was to be kept. Returns them, and
        as ``wake``."""
        came, self._came_meanwhile = self._came_meanwhile, []
        there = [request.request_id for request in unfinished(self._core)]
        waiting = there if mode == "wait" else [name for name in there if name in came]
        if not waiting or not self._config.wake_on_request:
            return [], None
        reason = self.wake()
        come_by(self._core)  # vLLM's loop may be about to wait, for it had no work before the sleep
        return waiting, reason

    def end_own_sleep(self) -> None:
        """Wake an engine that sleeps by itself for a call of its user, who put nothing to sleep."""
        if self.sleeps_by_itself:
            logger.info("A call wakes the engine.")
            self._core.wake_up()

    def works(self) -> None:
        """Note that the engine is not idle."""
        self._last_work = time.monotonic()
        self._failed_sleeps = 0

    def resumes(self) -> None:
        """Note that the engine serves, so that a later sleep is not answered with an old error."""
        self._failure = ""
        self.works()

    def rest(self) -> None:
        """The engine has nothing to do: put it to sleep, or look again when it is time."""
        core = self._core
        if self._idle_s == inf or core.is_sleeping() or core.is_scheduler_paused():
            return
        if unfinished(core) or core.scheduler.has_requests() or core.batch_queue:
            return
        rest = self._last_work + self._idle_s * 2**self._failed_sleeps - time.monotonic()
        if rest <= 0:
            self._sleep()
        elif self._timer is None:
            self._timer = Timer(rest, self._look_again)
            self._timer.daemon = True
            self._timer.start()

    def _look_again(self) -> None:
        self._timer = None
        come_by(self._core)

    def _sleep(self) -> None:
        self._falls_asleep = True
        failed = self._failed_sleeps  # a sleep that is rolled back resumes
        try:
            ranks: list[RankStatus] = self._core.model_executor.collective_rpc("sleep_status")
            level = self._level(ranks)
            logger.info(
                "Idle for %g s: the engine goes to sleep at level %d.",
                self._idle_s,
                level,
            )
            self._core.sleep(level, "wait")
            self._failed_sleeps = 0
            self.sleeps_by_itself = True
        except Exception as error:  # of whatever type a rank raised
            self._failed_sleeps = min(failed + 1, _MOST_DOUBLINGS)
            self._last_work = time.monotonic()
            logger.warning(
                "The idle engine did not fall asleep, and tries again in %g s: %s",
                self._idle_s * 2**self._failed_sleeps,
                restored(error),
            )
            self.rest()
        finally:
            self._falls_asleep = False

    def _level(self, ranks: Sequence[RankStatus]) -> int:
        """The option's; 1 if level 2 would lose weights for good."""
        if self._config.idle_level == 1:
            return 1
        for rank in ranks:
            if "weights" in rank and (lost := in_no_checkpoint(rank["weights"])):
                if lost != self._told:
                    logger.warning(
                        "The idle engine sleeps at level 1: %s are in no checkpoint", lost
                    )
                    self._told = lost
                return 1
        return self._config.idle_level

    @property
    def keeps_inputs(self) -> bool:
        """Whether a sleep is under way of which a front end does not know, or during which its
        requests may come."""
        if self._falls_asleep or not self._config.wake_on_request:
            return self._falls_asleep
        return EngineState.of(self._core).pauses_to_sleep or is_pending(self._core)


def resting(stock: Callable[["EngineCoreProc"], None]) -> Callable[["EngineCoreProc"], None]:
    """Before the engine's loop waits for its next message."""

    def _notify_idle_state_callbacks(self: "EngineCoreProc") -> None:
        stock(self)
        OnRequest.of(self).rest()
        if self.input_queue.empty():  # a wake that has come is not to wait for a move
            ToDisk.of(self).rest()

    return _notify_idle_state_callbacks


def keeping_inputs(stock: Callable[["EngineCore"], None]) -> Callable[["EngineCore"], None]:
    """The engine's copies of processed images. A front end sends each once, and believes it there
    until its own copies are reset. An engine that has more than its front end is in order."""

    def reset_mm_cache(self: "EngineCore") -> None:
        if not OnRequest.of(self).keeps_inputs:
            stock(self)

    return reset_mm_cache
