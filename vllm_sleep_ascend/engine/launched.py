# SPDX-License-Identifier: Apache-2.0
"""Engines under an external launcher (torchrun): one in the process of each rank.

Each engine gets only its own rank's answers, unlike with vLLM's other executors. After an error of
one rank, the others would enter the transaction without it. If one engine may not serve, the others
would wait in the model's collectives. So the ranks exchange their answers first.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_sleep_ascend.errors import SleepModeError

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

_T = TypeVar("_T")

# The worker's methods that an engine calls before a sleep to find out whether it may go on.
_BEFORE_A_SLEEP = ("synchronize_device", "sleep_refusal")


def on_any_rank(core: "EngineCore", mine: str | None) -> str | None:
    """The reason of the first rank that has one; the same on every rank of the engine."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    if not isinstance(core.model_executor, ExecutorWithExternalLauncher):
        return mine
    return next(filter(None, _exchange(core.model_executor, mine)), None)


def _exchange(executor: "ExecutorWithExternalLauncher", mine: _T) -> list[_T]:
    """The value of each rank, in rank order."""
    of_all: list[_T] = executor.driver_worker.agreement.exchange(mine)
    return of_all


def together(stock: Callable[..., list[_T]]) -> Callable[..., list[_T]]:
    def collective_rpc(
        self: "ExecutorWithExternalLauncher", method: object, *args: Any, **kwargs: Any
    ) -> list[_T]:
        sleeps = self.vllm_config.model_config.enable_sleep_mode
        if method not in _BEFORE_A_SLEEP or not sleeps:
            return stock(self, method, *args, **kwargs)
        try:
            answers = stock(self, method, *args, **kwargs)
        except Exception as error:
            _exchange(self, (str(error), []))
            raise
        ranks = _exchange(self, ("", answers))
        for failure, _ in ranks:
            if failure:
                raise SleepModeError(failure)
        return [answer for _, theirs in ranks for answer in theirs]

    return collective_rpc
