# SPDX-License-Identifier: Apache-2.0
"""Calls that reach a worker while its memory sleeps: accessing that memory is a device fault.

The engine's process sends each call that is not known to be safe as a ``GuardedCall``, with any
executor. The worker's process knows what sleeps. All ranks are in the same state, so either all run
a call or all refuse it.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vllm.v1.serial_utils import run_method

from vllm_sleep_ascend import policy
from vllm_sleep_ascend.config import KEY, SleepModeConfig
from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import SleepModeError

if TYPE_CHECKING:
    from vllm.v1.executor.abstract import Executor

    from vllm_sleep_ascend.rank.host_worker import HostWorker
    from vllm_sleep_ascend.rank.worker import SleepingWorker

Method = str | bytes | Callable[..., object]


class GuardedCall:
    """A worker's method (by name), or a function of the worker, that is refused if it may access
    sleeping memory.

    Raises:
        SleepModeError: it was refused.
    """

    def __init__(self, method: Method) -> None:
        self._method = method

    def __repr__(self) -> str:
        """The name in vLLM's errors."""
        if isinstance(self._method, str):
            return self._method
        return getattr(self._method, "__qualname__", type(self._method).__name__)

    def __call__(self, worker: object, *args: object, **kwargs: object) -> object:
        self._check(vars(worker).get("worker", worker))  # executors wrap their workers
        return run_method(worker, self._method, args, kwargs)

    def _check(self, worker: "SleepingWorker") -> None:
        name = str(self)
        by_name = isinstance(self._method, str)
        known = by_name and name in policy.NEEDS
        needed = policy.NEEDS[name] if known else ("weights",)
        asleep = worker.sleeping_tags()
        if asleep.isdisjoint(needed):
            return
        if known:
            raise asleep_error(worker, name, asleep.intersection(needed))
        function = getattr(worker, name, None) if by_name else self._method
        config = SleepModeConfig.from_vllm_config(worker.vllm_config)
        if config.calls_while_asleep == "allow" or hasattr(function, "safe_while_asleep"):
            return
        raise _refusal(
            worker,
            f"{name} was not run: {_listed(asleep)} asleep, and it may touch the weights; call "
            "wake_up(tags=['weights']) first. If it does not touch them, mark it with "
            "vllm_sleep_ascend.safe_while_asleep, or start the engine with additional_config="
            f"{{'{KEY}': {{'calls_while_asleep': 'allow'}}}}",
        )


def guards_calls(stock: Callable[..., object]) -> Callable[..., object]:
    """Wrapper of an executor's ``collective_rpc``. Calls during start-up are not guarded."""

    def collective_rpc(self: "Executor", method: Method, *args: object, **kwargs: object) -> object:
        enabled = self.vllm_config.model_config.enable_sleep_mode
        if enabled and hasattr(self, "sleeping_tags"):
            plain = isinstance(method, GuardedCall)
            if not plain and method not in (*policy.SAFE_CALLS, *policy.STEP_CALLS):
                method = GuardedCall(method)
        return stock(self, method, *args, **kwargs)

    return collective_rpc


def asleep_error(worker: "HostWorker", name: str, tags: Iterable[str]) -> SleepModeError:
    """The error of a method that needs the memory of these tags."""
    asleep = sorted(tags, reverse=True)
    return _refusal(
        worker,
        f"{name} needs memory that is asleep ({', '.join(asleep)}); call wake_up(tags={asleep}) "
        "first",
    )


def _refusal(worker: "HostWorker", text: str) -> SleepModeError:
    error = SleepModeError(text)
    if worker.parallel_config.world_size > 1:
        write_type(error)
    return error


def _listed(tags: Iterable[str]) -> str:
    names = sorted(tags, reverse=True)
    return f"{' and '.join(names)} {'is' if names == ['kv_cache'] else 'are'}"
