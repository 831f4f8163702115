# SPDX-License-Identifier: Apache-2.0
"""Every AscendCL and HCCL call of a sleep and a wake fails once on each of two ranks.

After each failure all ranks are awake or all sleep, the call can be retried, and the tokens are the
same. HcclGetCommAsyncError and aclrtQueryEventStatus are left out: a thread of torch_npu calls them
at random times to watch its communicators, and their failure ends that thread and the process.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from helpers.faults import DRIVER_ERROR, HCCL_ERROR
from helpers.ranks import assert_all, brief_meetings, fail_on
from vllm_sleep_ascend import safe_while_asleep
from vllm_sleep_ascend.sim import control

MEETINGS = ("HcclGetRootInfo", "HcclCommInitRootInfoConfig")
BACKGROUND = ("HcclGetCommAsyncError", "aclrtQueryEventStatus")
NEVER, TRIES = "did not happen", 5


@dataclass(frozen=True)
class Fault:
    operation: str
    rank: int
    call: str
    nth: int

    @property
    def leaves_others_waiting(self) -> bool:
        """Whether other ranks then wait for this one to create the first communicator."""
        return self.call in MEETINGS and self.nth == 1

    @property
    def rules(self) -> str:
        code = HCCL_ERROR if self.call.startswith("Hccl") else DRIVER_ERROR
        return f"{self.call}:{self.nth}:{code}"


@safe_while_asleep
def keep_log(worker: Any, on: bool) -> list[str]:
    log = [] if on else control.call_log()
    control.keep_call_log(on)
    return log


@safe_while_asleep
def fault_hits(worker: Any) -> int:
    return control.fault_hits()


class Sweep:
    """An engine and the outcomes: faults that an operation reported or handled, or whose call did
    not happen."""

    def __init__(self, llm: Any, level: int, tokens: Callable[[], Any]) -> None:
        self.llm, self.tokens = llm, tokens
        self.operations = {"sleep": lambda: llm.sleep(level=level), "wake": self._wake}
        self._level = level
        self.results: Counter[str] = Counter()
        self.expected = tokens()

    def _wake(self) -> None:
        self.llm.wake_up()

    def faults(self) -> Iterator[Fault]:
        """The faults of a cycle: calls that each rank makes in all of three cycles.

        This excludes occasional calls of torch_npu's threads. The first cycle is left out, because
        some calls happen only once.
        """
        for operation in self.operations.values():
            operation()
        self._serve()
        calls: dict[tuple[str, int], Counter[str]] = {}
        for _ in range(3):
            for name, operation in self.operations.items():
                self.llm.collective_rpc(keep_log, args=(True,))
                operation()
                logs = self.llm.collective_rpc(keep_log, args=(False,))
                for rank, log in enumerate(logs):
                    times = Counter(log)
                    calls[name, rank] = calls.get((name, rank), times) & times
            self._serve()
        for (name, rank), found in calls.items():
            for call, times in found.items():
                if call not in BACKGROUND:
                    yield from (Fault(name, rank, call, n + 1) for n in range(times))

    def run(self, fault: Fault) -> None:
        """One cycle with the fault, or a few until its call happens."""
        try:
            for _ in range(TRIES):
                outcome = self._run(fault)
                if outcome != NEVER:
                    break
        except AssertionError as error:
            error.add_note(str(fault))
            raise
        self.results[outcome] += 1

    def _run(self, fault: Fault) -> str:
        outcome = NEVER
        for name, operation in self.operations.items():
            if name == fault.operation:
                fail_on(self.llm, fault.rank, fault.rules)
            failures = hits = 0
            while True:
                alone = fault.leaves_others_waiting and name == fault.operation and not failures
                try:
                    with brief_meetings(self.llm) if alone else nullcontext():
                        operation()
                    hits = hits or self.llm.collective_rpc(fault_hits)[fault.rank]
                    break
                except RuntimeError as error:
                    hits = self.llm.collective_rpc(fault_hits)[fault.rank]
                    fail_on(self.llm, fault.rank, "")
                    failures += 1
                    assert_all(self.llm, "SUSPENDED" if name == "wake" else "RUNNING")
                    named = f"rank {fault.rank}, device {fault.rank}" in str(error)
                    assert named and failures == 1, error
            fail_on(self.llm, fault.rank, "")
            assert_all(self.llm, "SUSPENDED" if name == "sleep" else "RUNNING")
            if name == fault.operation and hits:
                outcome = "reported" if failures else "made good"
        self._serve()
        return outcome

    def _serve(self) -> None:
        if self._level == 2:
            self.llm.collective_rpc("reload_weights")
        self.llm.reset_prefix_cache()
        assert self.tokens() == self.expected


def first_of_each_name(faults: Iterator[Fault]) -> list[Fault]:
    """The first fault of each call; the ranks alternate."""
    chosen: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        if fault.nth == 1:
            chosen.setdefault((fault.operation, fault.call), []).append(fault)
    return [same[i % len(same)] for i, same in enumerate(chosen.values())]
