# SPDX-License-Identifier: Apache-2.0
"""One answer of every rank to every call, also when a call fails.

vLLM's multiprocessing executor stops reading at the first rank that answers with an error. What the
ranks behind it answered stays in their queues, and the next call takes it for its own answer.
"""

from collections.abc import Callable
from typing import Any

_READ_S = 600  # like Agreement: the slowest rank


class _Answers:
    """A rank's queue of answers that, at an error, reads those of the ranks behind it too."""

    def __init__(self, queue: Any, behind: list[Any]) -> None:
        self._queue, self._behind = queue, behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.executor.multiproc_executor import WorkerProc

        status, result = self._queue.dequeue(*args, **kwargs)
        if status != WorkerProc.ResponseStatus.SUCCESS:
            for queue in self._behind:
                queue.dequeue(timeout=_READ_S)
        return status, result


def reads_every_answer(stock: Callable) -> Callable:
    """Wrapper of ``MultiprocExecutor.collective_rpc``."""

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("unique_reply_rank") is not None:  # then the other ranks do not answer
            return stock(self, method, *args, **kwargs)
        queues = self.response_mqs
        self.response_mqs = [_Answers(q, queues[i + 1 :]) for i, q in enumerate(queues)]
        try:
            return stock(self, method, *args, **kwargs)
        finally:
            self.response_mqs = queues

    return collective_rpc
