# SPDX-License-Identifier: Apache-2.0
"""Two-phase commit: several ranks sleep or wake together, or not at all.

Each rank prepares, which may fail, and reports over the CPU; then all commit, which cannot fail, or
all roll back. A prepared sleep keeps its device memory, so that a rollback needs no memory that
another process may have taken. Device memory is therefore freed at the commit, not chunk by chunk;
a single rank frees it at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypedDict, TypeVar, cast

import torch.distributed as dist

from vllm_sleep_ascend.error_text import type_named
from vllm_sleep_ascend.errors import RankGoneError, SleepModeError

T = TypeVar("T")


class _Report(TypedDict):
    """A rank's error as it is sent to the others."""

    type: str
    text: str
    figures: dict[str, str | int]


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class Operation:
    """A rank's part of an operation. Each of ``steps`` starts after all ranks have finished the
    previous one, raises if it fails, and may leave something to roll back.

    ``commit`` commits what is prepared and cannot fail. ``abort`` rolls it back and returns what
    failed, or ``""``; ``abort_together`` is a second part of the rollback that needs the other
    ranks.

    Before the first step every rank sends its ``facts``. ``judge`` gets those of all ranks, and
    raises the same error on each rank, or on none. ``timeout`` is how long a rank waits for the
    slowest one; by default as long as for a sleep or a wake.
    """

    name: str
    steps: Sequence[Callable[[], None]]
    commit: Callable[[], None]
    abort: Callable[[], str]
    abort_together: Callable[[], str] = _nothing
    facts: Callable[[], object] = _nothing
    judge: Callable[[list[Any]], None] | None = None
    timeout: timedelta | None = None


class Agreement:
    """The ranks of one engine, each with its own device.

    ``size`` consecutive ranks are one engine; data-parallel engines share a world. ``timeout_s`` is
    how long a rank waits for the slowest one; the end of a rank's process is noticed at once.
    """

    def __init__(self, rank: int, size: int, device: int, timeout_s: float = 300) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._timeout = timedelta(seconds=timeout_s)
        me = dist.get_rank() if size > 1 else 0
        first = me - me % size
        self.members = range(first, first + size)  # of the world
        self._group = self._new_group() if size > 1 else None

    def carry_out(self, operation: Operation) -> None:
        """Do it on every rank, or on none.

        Raises:
            SleepModeError: a rank failed. The error is the same on every rank, and names the rank,
                its device and the cause.
            RankGoneError: another rank is gone, or did not respond in time.
        """
        if operation.judge is not None:
            operation.judge(self._exchange_for(operation, operation.facts(), None))
        for step in operation.steps:
            failure = _failure_of(step)
            reports = self._exchange_for(operation, self._report(failure), failure)
            failed = [report for report in reports if report is not None]
            if failed:
                self._roll_back(operation, failed)
        operation.commit()

    def exchange(self, mine: T, timeout: timedelta | None = None) -> list[T]:
        """Exchange a value with all ranks of the engine; returns all values in rank order.
        ``timeout`` is how long to wait for the slowest one; by default as for a sleep or a wake.

        Raises:
            RankGoneError: another rank is gone, or did not respond in time; names it.
        """
        timeout = timeout or self._timeout
        everybody = [mine] * self.size
        if self.size == 1:
            return everybody
        try:
            if self._group is None:
                self._group = self._new_group()
            # Rank 0 knows which rank is missing; a collective does not tell.
            dist.monitored_barrier(self._group, timeout, wait_all_ranks=True)
            dist.all_gather_object(everybody, mine, group=self._group)
        except RuntimeError as error:
            self._group = None  # every rank gets here; late messages must not reach the next call
            raise RankGoneError(
                f"another rank did not answer within {timeout.total_seconds():g} s "
                f"(rank_timeout_s): its process hangs or is gone ({error})"
            ) from error
        return everybody

    def _new_group(self) -> dist.ProcessGroup:
        group = dist.new_group(
            list(self.members), self._timeout, backend="gloo", use_local_synchronization=True
        )
        return cast(dist.ProcessGroup, group)  # this rank is one of its members

    def _exchange_for(self, operation: Operation, mine: T, failure: Exception | None) -> list[T]:
        try:
            return self.exchange(mine, operation.timeout)
        except RankGoneError as gone:
            trouble = operation.abort()
            raise RankGoneError(
                f"{operation.name} on rank {self.rank}, device {self.device}: {gone}. This rank is "
                f"as it was{_and(trouble)}. If the other does not answer again, restart the engine"
            ) from failure

    def _roll_back(self, operation: Operation, failed: list[_Report]) -> None:
        troubles = [operation.abort(), operation.abort_together()]
        mine = "; ".join(trouble for trouble in troubles if trouble)
        others = self.exchange(mine and f"rank {self.rank}, device {self.device}: {mine}")
        raise self._agreed(operation.name, failed, [trouble for trouble in others if trouble])

    def _report(self, error: Exception | None) -> _Report | None:
        if error is None:
            return None
        figures = {name: value for name, value in vars(error).items() if type(value) in (str, int)}
        where = f"rank {self.rank}, device {self.device}"
        text = str(error) or type(error).__name__
        return {"type": type(error).__name__, "text": f"{where}: {text}", "figures": figures}

    def _agreed(self, name: str, failed: list[_Report], troubles: list[str]) -> Exception:
        first = failed[0]
        kind = type_named(first["type"]) or SleepModeError
        texts = dict.fromkeys(report["text"] for report in failed)
        error = kind(
            f"{name} failed on {len(failed)} of {self.size} ranks, and happened on none: "
            f"{'; '.join(texts)}{_and('; '.join(troubles))}"
        )
        for figure, value in first["figures"].items():
            setattr(error, figure, value)
        return error


def _failure_of(step: Callable[[], None]) -> Exception | None:
    try:
        step()
    except Exception as error:
        return error
    return None


def _and(trouble: str) -> str:
    if not trouble:
        return ""
    return (
        f", apart from what could not be rolled back ({trouble}); nothing is lost: memory comes "
        "back with wake_up, and communicators with their next use"
    )
