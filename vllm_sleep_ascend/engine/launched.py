# SPDX-License-Identifier: Apache-2.0
"""Engines under an external launcher (torchrun): one in the process of each rank.

Each engine hears its own rank alone, where the engine of vLLM's other executors hears all. An error
of one rank before the ranks have met in a transaction would send the others into it, and an engine
that may not serve would leave the others alone in the model's collectives. So the ranks tell each
other first.
"""

from collections.abc import Callable
from typing import Any

from vllm_sleep_ascend.errors import SleepModeError

# The worker's methods that an engine calls before a sleep to find out whether it may go on.
_BEFORE_A_SLEEP = ("synchronize_device", "sleep_refusal")


def on_any_rank(core: Any, mine: str | None) -> str | None:
    """The first rank's reason that has one, which is the same on every rank of the engine."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    if not isinstance(core.model_executor, ExecutorWithExternalLauncher):
        return mine
    return next(filter(None, _exchange(core.model_executor, mine)), None)


def _exchange(executor: Any, mine: Any) -> list[Any]:
    return executor.driver_worker.worker.agreement.exchange(mine)


def together(stock: Callable) -> Callable:
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
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
