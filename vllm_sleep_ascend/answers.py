# SPDX-License-Identifier: Apache-2.0
"""One answer of every rank to every call, also when a call fails or a rank hangs.

vLLM's multiprocessing executor stops reading at the first rank that answers with an error. What the
ranks behind it answered stays in their queues, and the next call takes it for its own answer. And
it waits without end for a rank that hangs, though the others have said so.
"""

import time
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.errors import RankGoneError

logger = init_logger(f"vllm.{__name__}")

_LOOK_S = 1.0  # how often to look at the ranks behind while one does not answer
_ABORT_S = 10.0  # to take back what a rank holds


class _Answers:
    """A rank's queue of answers that, at an error, reads those of the ranks behind it too."""

    def __init__(self, rank: int, queue: Any, grace_s: float) -> None:
        self._rank, self._queue, self._grace_s = rank, queue, grace_s
        self._early: list[Any] = []
        self.behind: list[_Answers] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, timeout: float | None = None, **kwargs: Any) -> Any:
        """
        Raises:
            RankGoneError: another rank has failed, and this one or one behind it did not answer
                since.
        """
        status, result = self._take(timeout, **kwargs)
        if _failed(status):
            deadline = time.monotonic() + self._grace_s
            for other in self.behind:
                other._take_by(deadline, result)
        return status, result

    def _take(self, timeout: float | None, **kwargs: Any) -> Any:
        if self._early:
            return self._early.pop()
        if timeout is not None or not self.behind:
            return self._queue.dequeue(timeout=timeout, **kwargs)
        while True:
            try:
                return self._queue.dequeue(timeout=_LOOK_S, **kwargs)
            except TimeoutError:
                error = next((e for other in self.behind if (e := other._look())), None)
                if error is not None:
                    return self._take_by(time.monotonic() + self._grace_s, error)

    def _look(self) -> Any:
        """The error with which this rank has answered; None if with none, or not yet."""
        if not self._early:
            try:
                self._early.append(self._queue.dequeue(timeout=0.001))
            except TimeoutError:
                return None
        status, result = self._early[0]
        return result if _failed(status) else None

    def _take_by(self, deadline: float, error: Any) -> Any:
        if self._early:
            return self._early.pop()
        try:
            return self._queue.dequeue(timeout=max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            raise RankGoneError(
                f"rank {self._rank} hangs: it did not answer for {self._grace_s:g} s after "
                f"another rank had failed; restart the engine. The other's error: {error}"
            ) from None


def _failed(status: Any) -> bool:
    from vllm.v1.executor.multiproc_executor import WorkerProc

    return status != WorkerProc.ResponseStatus.SUCCESS


def reads_every_answer(stock: Callable) -> Callable:
    """Wrapper of ``MultiprocExecutor.collective_rpc``."""

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("unique_reply_rank") is not None:  # then the other ranks do not answer
            return stock(self, method, *args, **kwargs)
        queues = self.response_mqs
        grace_s = SleepModeConfig.slowest_rank_s(self.vllm_config) + _ABORT_S
        answers = [_Answers(rank, queue, grace_s) for rank, queue in enumerate(queues)]
        for rank, answer in enumerate(answers):
            answer.behind = answers[rank + 1 :]
        self.response_mqs = answers
        try:
            return stock(self, method, *args, **kwargs)
        except RankGoneError as error:
            _give_up(self, error)
            raise
        finally:
            if self.response_mqs is answers:  # else the executor was shut down
                self.response_mqs = queues

    return collective_rpc


def _give_up(executor: Any, error: RankGoneError) -> None:
    """As vLLM does when a worker's process ends: nobody would read the late answer as one."""
    logger.error("%s", error)
    executor.is_failed = True
    executor.shutdown()
    callback, executor.failure_callback = executor.failure_callback, None
    if callback is not None:
        callback()
