# SPDX-License-Identifier: Apache-2.0
"""Every call reads one answer of every rank, also when it fails or a rank hangs.

vLLM's multiprocessing executor stops reading at the first rank that answers with an error. What the
ranks behind it answered stays in their queues, and the next call takes it for its own answer. The
same happens after a call whose ``timeout`` passes: its answers come later. And the executor waits
forever for a rank that hangs, even if the others have failed.
"""

import time
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from vllm.logger import init_logger

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.error_text import restored
from vllm_sleep_ascend.errors import RankGoneError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.v1.executor.multiproc_executor import WorkerProc

logger = init_logger(f"vllm.{__name__}")

# Our own calls: every rank does the same work, so one that lags is stuck. A user's calls have no
# such limit.
_OURS = (
    *("sleep_refusal", "synchronize_device", "sleep", "wake_up", "discard"),
    *("sleeping_tags", "sleep_status", "weights_content", "give_weight_version"),
)
# Calls in which each rank does its part alone: one that takes long after another's error does not
# hang. If its process ends, vLLM's monitor shuts the executor down, which ends the wait.
_ALONE = ("reload_weights", "save_sharded_state", "save_tensorized_model")
_LOOK_S = 1.0  # how often to look at the ranks behind while one does not answer
_MOST_OWED = 5  # vLLM's queue of calls holds ten that a rank has not read; more would block
_ABORT_S = 10.0  # to take back what a rank holds
_LARGE_S = 60.0  # for a large answer to follow its mark

_Answer = tuple["WorkerProc.ResponseStatus", Any]  # what the method returned, or the error's text


class _Executor(Protocol):
    """What is used of vLLM's MultiprocExecutor."""

    vllm_config: "VllmConfig"
    is_failed: bool
    failure_callback: Callable[[], None] | None
    response_mqs: list[Any]  # vLLM's queues, and here what reads them in their place

    def shutdown(self) -> None: ...


class _Rank:
    """A rank's queue of answers. Late answers to calls that were given up are dropped before the
    next one is read. Deadlines are of ``time.monotonic``."""

    def __init__(self, queue: "MessageQueue") -> None:
        self._queue = queue
        self.owed = 0  # calls that were given up before this rank had answered
        self._since = 0.0  # when it began to owe answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, timeout: float | None = None) -> _Answer:
        """The answer to a call that this rank alone answers."""
        try:
            return self.take(_deadline(timeout))
        except TimeoutError:
            self.owe()
            raise

    def owe(self) -> None:
        """Note that the call that the next answer belongs to was given up."""
        if not self.owed:
            self._since = time.monotonic()
        self.owed += 1

    def settle(self, rank: int, grace_s: float) -> None:
        """Wait for the answers that the rank owes: ``grace_s`` seconds from when it began to, and
        if they have passed, for a moment.

        Raises:
            RankGoneError: they did not come.
        """
        now = time.monotonic()
        try:
            self.catch_up(max(now + _LOOK_S, self._since + grace_s))
        except TimeoutError:
            raise RankGoneError(
                f"rank {rank} has not answered an earlier call, whose timeout passed "
                f"{time.monotonic() - self._since:.0f} s ago (rank_timeout_s), and nothing was "
                "sent to any rank; repeat the call if the rank may still be at work, or else "
                "restart the engine"
            ) from None

    def take(self, deadline: float = inf) -> _Answer:
        self.catch_up(deadline)
        return self._read(deadline)

    def catch_up(self, deadline: float = inf) -> None:
        while self.owed:
            self._read(deadline)
            self.owed -= 1

    def _read(self, deadline: float) -> _Answer:
        if deadline == inf:
            answer: _Answer = self._queue.dequeue()
            return answer
        return _dequeue(self._queue, max(0.001, deadline - time.monotonic()))


class _Answers:
    """A rank's answer to a call of all ranks. At an error, those of the ranks behind are read too.

    ``bounded``: once a rank has answered, the others have ``grace_s`` seconds. Else only after an
    error: ranks may take their time with what a user calls.
    """

    def __init__(self, rank: int, queue: _Rank, bounded: bool, grace_s: float) -> None:
        self._rank, self._queue, self._bounded, self._grace_s = rank, queue, bounded, grace_s
        self._early: list[_Answer] = []
        self.behind: list[_Answers] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, timeout: float | None = None) -> _Answer:
        """
        Raises:
            RankGoneError: this rank or one behind it did not answer after another had.
            TimeoutError: it did not answer within ``timeout`` seconds.
        """
        deadline = _deadline(timeout)
        try:
            status, result = self._take(deadline)
        except TimeoutError:
            for answer in (self, *self.behind):
                answer._forgo()
            raise
        if _failed(status):
            since = time.monotonic()
            for other in self.behind:
                other._follow(since, deadline, result)
        return status, result

    def _take(self, deadline: float) -> _Answer:
        if self._early:
            return self._early.pop()
        if deadline < inf:
            return self._queue.take(deadline)
        while True:
            try:
                return self._queue.take(time.monotonic() + _LOOK_S)
            except TimeoutError:
                # Ranks before this one have answered, since they are read in order.
                answers = [answer for other in self.behind if (answer := other._look())]
                errors = [result for status, result in answers if _failed(status)]
                if errors or (self._bounded and (answers or self._rank > 0)):
                    return self._take_in_grace(time.monotonic(), "".join(errors[:1]))

    def _look(self) -> _Answer | None:
        """What this rank has answered; None if it has not yet."""
        if not self._early:
            try:
                self._early.append(self._queue.take(time.monotonic()))
            except TimeoutError:
                return None
        return self._early[0]

    def _follow(self, since: float, deadline: float, error: str) -> None:
        """After another's error, keep this rank's answer from staying in the queue."""
        if not self._early and self._queue.owed:  # busy with an earlier call, which may take long
            self._forgo()
            return
        if self._grace_s < inf:
            self._take_in_grace(since, error)
            return
        try:
            self._take(deadline)
        except TimeoutError:
            self._forgo()

    def _forgo(self) -> None:
        if self._early:
            self._early.pop()
        else:
            self._queue.owe()

    def _take_in_grace(self, since: float, error: str) -> _Answer:
        if self._early:
            return self._early.pop()
        try:
            return self._queue.take(since + self._grace_s)
        except TimeoutError:
            raise RankGoneError(
                f"rank {self._rank} hangs: another rank has answered, and it did not within "
                f"{self._grace_s:g} s; restart the engine"
                + (f". The other's error: {error}" if error else "")
            ) from None


def _has_timeout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return (args[0] if args else kwargs.get("timeout")) is not None


def _deadline(timeout: float | None) -> float:
    return inf if timeout is None else time.monotonic() + timeout


def _dequeue(queue: "MessageQueue", timeout: float) -> _Answer:
    """As vLLM's, which may lose a large answer: it takes the mark from the queue, and then times
    out on the socket over which the answer itself comes."""
    mark = queue.current_idx
    answer: _Answer
    try:
        answer = queue.dequeue(timeout=timeout)
    except TimeoutError:
        if queue.current_idx == mark:
            raise
        answer = queue.recv(queue.local_socket, _LARGE_S)
    return answer


def _failed(status: "WorkerProc.ResponseStatus") -> bool:
    from vllm.v1.executor.multiproc_executor import WorkerProc

    return status != WorkerProc.ResponseStatus.SUCCESS


def reads_every_answer(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrapper of ``MultiprocExecutor.collective_rpc``."""

    def collective_rpc(self: _Executor, method: object, *args: Any, **kwargs: Any) -> Any:
        if self.is_failed:
            raise RuntimeError("Executor failed: a rank is gone; restart the engine")
        if not all(isinstance(queue, _Rank) for queue in self.response_mqs):
            self.response_mqs = [_Rank(queue) for queue in self.response_mqs]
        queues = self.response_mqs
        slowest_s = SleepModeConfig.slowest_rank_s(self.vllm_config) + _ABORT_S
        for rank, queue in enumerate(queues):
            if queue.owed and not _has_timeout(args, kwargs):
                queue.settle(rank, slowest_s)
            elif queue.owed >= _MOST_OWED:
                queue.settle(rank, 0)
        if kwargs.get("unique_reply_rank") is not None:  # then the other ranks do not answer
            return stock(self, method, *args, **kwargs)
        grace_s = inf if method in _ALONE else slowest_s
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
            raised = restored(error)
            if raised is error:
                raise
            raise raised from error
        finally:
            if self.response_mqs is answers:  # else the executor was shut down
                self.response_mqs = queues

    return collective_rpc


def _give_up(executor: _Executor, error: RankGoneError) -> None:
    """Shut the executor down, as vLLM does when a worker's process ends: the next call would read
    the late answer."""
    logger.error("%s", error)
    executor.is_failed = True
    executor.shutdown()
    callback, executor.failure_callback = executor.failure_callback, None
    if callback is not None:
        callback()
