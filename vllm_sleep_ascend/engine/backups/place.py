# SPDX-License-Identifier: Apache-2.0
"""The place that a sleep names for its backups, on the way from an EngineCore to its workers.

vLLM's EngineCore hands its executor the level of a sleep and no more, perhaps later, when requests
have ended. Only one sleep at a time is under way, so the executor keeps the place until then.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_sleep_ascend.engine.wrap import wrap
from vllm_sleep_ascend.policy import DEFERRABLE_TAGS, Place

if TYPE_CHECKING:
    from vllm.v1.executor.abstract import Executor

_ATTRIBUTE = "sleep_mode_place"


def set_place(executor: "Executor", place: Place | None) -> None:
    """Where the next sleep puts backups; None: where the options say."""
    if place is not None:
        wrap(type(executor), "sleep", sleeping_to)  # a user's own class may have another
    setattr(executor, _ATTRIBUTE, place)


def sleeping_to(stock: Callable[["Executor", int], None]) -> Callable[["Executor", int], None]:
    """Wrapper of an executor's ``sleep``. What really sleeps then, the EngineCore asks its workers;
    if they do not answer, all of it counts as asleep."""

    def sleep(self: "Executor", level: int = 1) -> None:
        place: Place | None = getattr(self, _ATTRIBUTE, None)
        if place is None:
            return stock(self, level)
        self.collective_rpc("sleep", kwargs={"level": level, "to": place})
        self.sleeping_tags |= set(DEFERRABLE_TAGS)
        if not isinstance(getattr(type(self), "is_sleeping", None), property):
            vars(self)["is_sleeping"] = True  # vLLM 0.23 keeps both
        return None

    return sleep
