# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake of several ranks: all do it, or none.

Each rank first does everything that can fail and holds it; then all tell each other how it went,
over the CPU; then each carries it out, which cannot fail, or takes it back. What is held keeps its
device memory, so that taking back a sleep needs no memory that another process may have taken. The
price is that device memory comes free at the end of a sleep and not chunk by chunk: one rank alone
does not pay it.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vllm_sleep_ascend import errors
from vllm_sleep_ascend.errors import SleepModeError

_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the slowest. A rank whose process ends is noticed at once."""


class Agreement:
    """The ranks of one engine, each with a device of its own.

    ``size`` ranks in a row are one engine; data-parallel engines share a world. Every rank of the
    world has to make one.
    """

    def __init__(self, rank: int, size: int, device: int) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._group: Any = None
        if size == 1:
            return
        world = dist.get_world_size()
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, timeout=_TIMEOUT, backend="gloo")
            if dist.get_rank() in ranks:
                self._group = group

    def together(
        self,
        operation: str,
        prepare: Callable[[], None],
        commit: Callable[[], None],
        abort: Callable[[], str],
    ) -> None:
        """Run ``prepare`` on every rank, then ``commit`` on all or ``abort`` on all.

        ``prepare`` raises if it fails, and may leave something to take back; ``abort`` takes back
        what there is and returns what failed in that, ``""`` if nothing did.

        Raises:
            SleepModeError: a rank failed, the same error on every rank: it names the rank, its
                device and the cause. Or another rank is gone.
        """
        failure: Exception | None = None
        try:
            prepare()
        except Exception as error:
            failure = error
        try:
            reports = self._tell(self._report(failure))
        except RuntimeError as error:
            trouble = abort()
            raise SleepModeError(
                f"{operation} on rank {self.rank}, device {self.device}: another rank did not "
                f"answer, its process may be gone ({error}). This rank is as it was"
                f"{_and(trouble)}; restart the engine"
            ) from failure
        failed = [report for report in reports if report is not None]
        if not failed:
            commit()
            return
        trouble = abort()
        others = self._tell(trouble and f"rank {self.rank}, device {self.device}: {trouble}")
        raise self._agreed(operation, failed, [trouble for trouble in others if trouble])

    def _report(self, error: Exception | None) -> dict[str, Any] | None:
        if error is None:
            return None
        figures = {name: value for name, value in vars(error).items() if type(value) in (str, int)}
        where = f"rank {self.rank}, device {self.device}"
        return {"type": type(error).__name__, "text": f"{where}: {error}", "figures": figures}

    def _agreed(self, operation: str, failed: list[dict], troubles: list[str]) -> Exception:
        first = failed[0]
        kind: Any = getattr(errors, first["type"], SleepModeError)
        if first["type"] == "ValueError":
            kind = ValueError
        text = "; ".join(report["text"] for report in failed)
        error = kind(
            f"{operation} failed on {len(failed)} of {self.size} ranks, and happened on none: "
            f"{text}{_and('; '.join(troubles))}"
        )
        for name, value in first["figures"].items():
            setattr(error, name, value)
        return error

    def _tell(self, mine: Any) -> list[Any]:
        everybody = [None] * self.size
        dist.all_gather_object(everybody, mine, group=self._group)
        return everybody


def _and(trouble: str) -> str:
    if not trouble:
        return ""
    return f", apart from what could not be taken back ({trouble}): wake_up brings it back"
