# SPDX-License-Identifier: Apache-2.0
"""An engine that has slept at level 1 for long moves its backup to disk by itself
(``to_disk_after_s``).

The engine's own process decides, in its loop, where calls and requests come one after the other: a
wake that comes first leaves nothing to move, and one that comes during a move follows it.
"""

import time
from math import inf
from threading import Timer
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine.state import EngineState, come_by
from vllm_sleep_ascend.error_text import restored
from vllm_sleep_ascend.status import RankStatus, level_of, state_of

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

logger = init_logger(f"vllm.{__name__}")

_MOST_DOUBLINGS = 6


class ToDisk:
    """Moves the backup of a sleeping EngineCore, as far as the option asks for that."""

    def __init__(self, core: "EngineCore") -> None:
        config = SleepModeConfig()
        if core.vllm_config.model_config.enable_sleep_mode:
            config = SleepModeConfig.from_vllm_config(core.vllm_config)
        self._core = core
        self._after_s = inf if config.to_disk_after_s is None else config.to_disk_after_s
        self._asleep_since: float | None = None  # or since the last attempt; None: nothing to move
        self._was_asleep = False
        self._failures = 0
        self._told = ""
        self._timer: Timer | None = None

    @classmethod
    def of(cls, core: "EngineCore") -> "ToDisk":
        """This engine's."""
        state = EngineState.of(core)
        if state.to_disk is None:
            state.to_disk = cls(core)
        return state.to_disk

    def follow(self) -> None:
        """Note what sleeps now."""
        asleep = "weights" in self._core.model_executor.sleeping_tags
        if asleep != self._was_asleep:
            self._was_asleep = asleep
            self.begin() if asleep else self._end()

    def begin(self) -> None:
        """The time begins: the weights fell asleep, or their backup was put somewhere."""
        self._asleep_since, self._failures = time.monotonic(), 0
        self._forget_timer()

    def _end(self) -> None:
        self._asleep_since, self._told = None, ""
        self._forget_timer()

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def rest(self) -> None:
        """The engine has nothing to do: move the backup, or look again when it is time."""
        if self._after_s == inf or self._asleep_since is None:
            return
        left = self._asleep_since + self._after_s * 2**self._failures - time.monotonic()
        if left <= 0:
            self._move()
        elif self._timer is None:
            self._timer = Timer(left, self._look_again)
            self._timer.daemon = True
            self._timer.start()

    def _look_again(self) -> None:
        self._timer = None
        come_by(self._core)

    def _move(self) -> None:
        executor = self._core.model_executor
        try:
            ranks: list[RankStatus] = executor.collective_rpc("sleep_status")
            in_host = sum(rank["backups"]["host"] for rank in ranks if "backups" in rank)
            if not in_host or level_of(ranks) != 1:
                self._end()
            elif state_of(ranks, True) == "asleep":
                logger.info("Asleep for %g s: the backup moves to disk.", self._after_s)
                executor.collective_rpc("sleep", kwargs={"level": 1, "to": "disk"})
                self._end()
            else:  # a sleep would put to sleep what its user has woken
                self.begin()
                self.rest()
        except Exception as error:  # of whatever type a rank raised
            self._failures = min(self._failures + 1, _MOST_DOUBLINGS)
            self._asleep_since = time.monotonic()
            reason = str(restored(error))
            if reason != self._told:
                self._told = reason
                logger.warning(
                    "The backup stays in host memory, and the move to disk is tried again in %g s "
                    "and then ever more rarely: %s",
                    self._after_s * 2**self._failures,
                    reason,
                )
            self.rest()
