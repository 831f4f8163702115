# SPDX-License-Identifier: Apache-2.0
"""One answer of every rank to every call, also when a call fails or a rank hangs.

vLLM's multiprocessing executor stops reading at the first rank that answers with an error. What the
ranks behind it answered stays in their queues, and the next call takes it for its own answer. And
it waits without end for a rank that hangs, though the others have said so.
"""

import re
import time
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_sleep_ascend import errors
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.errors import RankGoneError

logger = init_logger(f"vllm.{__name__}")

_FROM_WORKER = re.compile(r"Worker failed with error '(\w+): (.*)', please check .*", re.DOTALL)
# Of sleep and wake, in which all ranks do the same. What a user calls may take one rank long.
_OURS = (
    *("sleep_refusal", "synchronize_device", "sleep", "wake_up", "discard"),
    *("sleeping_tags", "sleep_status", "weights_content"),
)
_LOOK_S = 1.0  # how often to look at the ranks behind while one does not answer
_ABORT_S = 10.0  # to take back what a rank holds
_LARGE_S = 60.0  # for a large answer to follow its mark


class _Answers:
    """A rank's queue of answers that, at an error, reads those of the ranks behind it too.

    ``bounded``: once a rank has answered, the others have ``grace_s`` seconds. Else only after an
    error: ranks may take their time with what a user calls.
    """

    def __init__(self, rank: int, queue: Any, bounded: bool, grace_s: float) -> None:
        self._rank, self._queue, self._bounded, self._grace_s = rank, queue, bounded, grace_s
        self._early: list[Any] = []
        self.behind: list[_Answers] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, timeout: float | None = None, **kwargs: Any) -> Any:
        """
        Raises:
            RankGoneError: this rank or one behind it did not answer after another had.
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
        if timeout is not None:
            return _dequeue(self._queue, timeout, **kwargs)
        while True:
            try:
                return _dequeue(self._queue, _LOOK_S, **kwargs)
            except TimeoutError:
                # Ranks before this one have answered, since they are read in order.
                answers = [answer for other in self.behind if (answer := other._look())]
                errors = [result for status, result in answers if _failed(status)]
                if errors or (self._bounded and (answers or self._rank > 0)):
                    deadline = time.monotonic() + self._grace_s
                    return self._take_by(deadline, "".join(errors[:1]))

    def _look(self) -> Any:
        """What this rank has answered; None if it has not yet."""
        if not self._early:
            try:
                self._early.append(_dequeue(self._queue, 0.001))
            except TimeoutError:
                return None
        return self._early[0]

    def _take_by(self, deadline: float, error: str) -> Any:
        if self._early:
            return self._early.pop()
        try:
            return _dequeue(self._queue, max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            raise RankGoneError(
                f"rank {self._rank} hangs: another rank has answered, and it did not within "
                f"{self._grace_s:g} s; restart the engine"
                + (f". The other's error: {error}" if error else "")
            ) from None


def _dequeue(queue: Any, timeout: float, **kwargs: Any) -> Any:
    """As vLLM's, which loses a large answer: in the queue is only a mark, which it takes, and the
    answer itself comes over a socket, for which it may be too soon."""
    mark = queue.current_idx
    try:
        return queue.dequeue(timeout=timeout, **kwargs)
    except TimeoutError:
        if queue.current_idx == mark:
            raise
        return queue.recv(queue.local_socket, _LARGE_S)


def _failed(status: Any) -> bool:
    from vllm.v1.executor.multiproc_executor import WorkerProc

    return status != WorkerProc.ResponseStatus.SUCCESS


def reads_every_answer(stock: Callable) -> Callable:
    """Wrapper of ``MultiprocExecutor.collective_rpc``."""

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_failed:
            raise RuntimeError("Executor failed: a rank is gone; restart the engine")
        if kwargs.get("unique_reply_rank") is not None:  # then the other ranks do not answer
            return stock(self, method, *args, **kwargs)
        queues = self.response_mqs
        grace_s = SleepModeConfig.slowest_rank_s(self.vllm_config) + _ABORT_S
        bounded = method in _OURS
        answers = [_Answers(rank, queue, bounded, grace_s) for rank, queue in enumerate(queues)]
        for rank, answer in enumerate(answers):
            answer.behind = answers[rank + 1 :]
        self.response_mqs = answers
        try:
            return stock(self, method, *args, **kwargs)
        except RankGoneError as error:
            _give_up(self, error)
            raise
        except RuntimeError as error:
            _raise_as_it_was(error)
            raise
        finally:
            if self.response_mqs is answers:  # else the executor was shut down
                self.response_mqs = queues

    return collective_rpc


def _raise_as_it_was(error: RuntimeError) -> None:
    """Only its text comes from a worker's process; ours begin with their type."""
    crossed = _FROM_WORKER.fullmatch(str(error))
    kind = getattr(errors, crossed[1], None) if crossed else None
    if crossed and kind:
        raise kind(crossed[2]) from error


def _give_up(executor: Any, error: RankGoneError) -> None:
    """As vLLM does when a worker's process ends: nobody would read the late answer as one."""
    logger.error("%s", error)
    executor.is_failed = True
    executor.shutdown()
    callback, executor.failure_callback = executor.failure_callback, None
    if callback is not None:
        callback()
