# SPDX-License-Identifier: Apache-2.0
"""Every call reads one answer of every rank, also when it fails or a rank hangs.

vLLM's multiprocessing executor stops reading at the first rank that answers with an error. What the
ranks behind it answered stays in their queues, and the next call takes it for its own answer. The
same happens after a call whose ``timeout`` passes: its answers come later. And the executor waits
forever for a rank that hangs, even if the others have failed.

vLLM's ``collective_rpc`` still sends the call and makes its result, and only reads from other
queues. An executor class of our own would have to repeat it, which differs in each supported vLLM
(aggregators, fault tolerance), and would not reach Ray's executor, vllm-ascend's or a user's.
"""

import time
from collections.abc import Callable
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.error_text import restored
from vllm_sleep_ascend.errors import RankGoneError
from vllm_sleep_ascend.policy import OUR_CALLS

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

logger = init_logger(f"vllm.{__name__}")

# Calls in which each rank does its part alone: one that takes long after another's error does not
# hang. If its process ends, vLLM's monitor shuts the executor down, which ends the wait.
_ALONE = ("reload_weights", "save_image", "save_sharded_state", "save_tensorized_model")
_LOOK_S = 1.0  # how often to look at the other ranks while one does not answer
_MOST_OWED = 5  # vLLM's queue of calls holds ten that a rank has not read; more would block
_ABORT_S = 10.0  # to roll back what a rank has prepared
_LARGE_S = 60.0  # for a large answer to follow its mark

_Answer = tuple["WorkerProc.ResponseStatus", Any]  # what the method returned, or the error's text


class _Rank:
    """The answers of a rank. Deadlines are of ``time.monotonic``."""

    def __init__(self, rank: int, queue: "MessageQueue") -> None:
        self.rank, self._queue = rank, queue
        self.given_up: list[float] = []  # when each call was that it has yet to answer

    def take(self, deadline: float) -> _Answer:
        """The answer to the next call. Those to calls that were given up are dropped."""
        self._drop_late(deadline)
        return self._read(deadline)

    def settle(self, grace_s: float) -> None:
        """Wait for its late answers: ``grace_s`` seconds from when the first call was given up, and
        if they have passed, for a moment.

        Raises:
            RankGoneError: they did not come.
        """
        since = self.given_up[0]
        try:
            self._drop_late(max(time.monotonic() + _LOOK_S, since + grace_s))
        except TimeoutError:
            raise RankGoneError(
                f"rank {self.rank} has not answered an earlier call, whose timeout passed "
                f"{time.monotonic() - since:.0f} s ago (rank_timeout_s), and nothing was sent to "
                "any rank; repeat the call if the rank may still be at work, or else restart the "
                "engine"
            ) from None

    def _drop_late(self, deadline: float) -> None:
        while self.given_up:
            self._read(deadline)
            self.given_up.pop(0)

    def _read(self, deadline: float) -> _Answer:
        """vLLM's ``dequeue`` may lose a large answer: it takes the mark from the queue, and then
        times out on the socket over which the answer itself comes."""
        mark = self._queue.current_idx
        answer: _Answer
        try:
            answer = self._queue.dequeue(timeout=max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            if self._queue.current_idx == mark:
                raise
            answer = self._queue.recv(self._queue.local_socket, _LARGE_S)
        return answer


class _Answers:
    """The answers of some ranks to one call, in place of vLLM's queues: the first read takes all.

    After an error of one, the others have ``grace_s`` seconds; in a call of ``ours`` after any
    answer, since all do the same work, and one that lags is stuck. With what a user calls, ranks
    may take their time.
    """

    def __init__(self, ranks: list[_Rank], ours: bool, grace_s: float) -> None:
        self._ranks, self._ours, self._grace_s = ranks, ours, grace_s
        self._answers: list[_Answer] = []

    def dequeue(self, timeout: float | None = None) -> _Answer:
        """The answer of the next rank."""
        if not self._answers:
            self._answers = self._take(inf if timeout is None else time.monotonic() + timeout)
        return self._answers.pop(0)

    def _take(self, deadline: float) -> list[_Answer]:
        """
        Raises:
            RankGoneError: a rank did not answer after another had.
            TimeoutError: a rank did not answer before the deadline, and none had an error.
        """
        answers: dict[_Rank, _Answer] = {}
        errors: list[_Answer] = []
        missing, grace_ends = self._ranks, inf
        while missing:
            wait_s = _LOOK_S
            for rank in missing:
                try:
                    answers[rank] = rank.take(min(deadline, grace_ends, time.monotonic() + wait_s))
                except TimeoutError:
                    wait_s = 0.0  # those behind it may have answered
            missing = [rank for rank in missing if rank not in answers]
            errors = [answer for answer in answers.values() if answer[0].name != "SUCCESS"]
            now = time.monotonic()
            if now >= deadline or (errors and all(rank.given_up for rank in missing)):
                break  # after an error, nobody waits for ranks that are busy with an earlier call
            if now >= grace_ends and missing:
                raise RankGoneError(
                    f"rank {missing[0].rank} hangs: another rank has answered, and it did not "
                    f"within {self._grace_s:g} s; restart the engine"
                    + (f". The other's error: {errors[0][1]}" if errors else "")
                )
            if grace_ends == inf and (errors or (self._ours and answers)):
                grace_ends = now + self._grace_s
        for rank in missing:
            rank.given_up.append(time.monotonic())
        if missing and not errors:
            raise TimeoutError
        return [answers.get(rank) or errors[0] for rank in self._ranks]


class _Reading:
    """An executor as it is, but for the queues that it reads answers from."""

    def __init__(self, executor: "MultiprocExecutor", queues: list[_Answers]) -> None:
        self._executor, self.response_mqs = executor, queues

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def reads_every_answer(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrapper of ``MultiprocExecutor.collective_rpc``."""

    def slowest_s(executor: "MultiprocExecutor") -> float:
        """Not asked for in a step of the engine, which one rank answers."""
        return SleepModeConfig.slowest_rank_s(executor.vllm_config) + _ABORT_S

    def collective_rpc(self: "MultiprocExecutor", method: object, *args: Any, **kwargs: Any) -> Any:
        if self.is_failed:
            raise RuntimeError("Executor failed: a rank is gone; restart the engine")
        if "sleep_mode_ranks" not in vars(self):
            vars(self)["sleep_mode_ranks"] = list(map(_Rank, count(), self.response_mqs))
        ranks: list[_Rank] = vars(self)["sleep_mode_ranks"]
        timed = (args[0] if args else kwargs.get("timeout")) is not None
        for rank in ranks:
            if len(rank.given_up) >= (_MOST_OWED if timed else 1):
                rank.settle(0 if timed else slowest_s(self))
        if kwargs.get("unique_reply_rank") is None:
            grace_s = inf if str(method) in _ALONE else slowest_s(self)  # or as a GuardedCall
            queues = [_Answers(ranks, method in OUR_CALLS and not timed, grace_s)] * len(ranks)
        else:  # vLLM reads the answer of one rank, or of each for itself
            queues = [_Answers([rank], False, inf) for rank in ranks]
        try:
            return stock(_Reading(self, queues), method, *args, **kwargs)
        except RankGoneError as error:
            _give_up(self, error)
            raise
        except RuntimeError as error:
            raised = restored(error)
            if raised is error:
                raise
            raise raised from error

    return collective_rpc


def _give_up(executor: "MultiprocExecutor", error: RankGoneError) -> None:
    """Shut the executor down, as vLLM does when a worker's process ends: the next call would read
    the late answer."""
    logger.error("%s", error)
    executor.is_failed = True
    executor.shutdown()
    callback, executor.failure_callback = executor.failure_callback, None
    if callback is not None:
        callback()
