# SPDX-License-Identifier: Apache-2.0
"""Every AscendCL and HCCL call of a sleep and of a wake fails once, on each of two ranks.

    make rank-faults        all of them
    python tests/rank_faults.py MODEL --sample      the first call of each name, ranks in turn

Whatever fails, all ranks are awake or all sleep, the call can be repeated, and the tokens stay. One
call of HCCL is left out: by HcclGetCommAsyncError torch_npu looks after a communicator in the
background, and ends the process if it fails.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent / "e2e")]
# The second rank's tries to meet the first one end soon.
os.environ.setdefault("HCCL_CONNECT_TIMEOUT", "2")
os.environ.setdefault("NPU_SIM_DEVICES", "2")
os.environ.setdefault("HCCL_BUFFSIZE", "4")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from ranks import assert_all, fail_on

from vllm_sleep_ascend.sim import control

RANKS = 2
DRIVER_ERROR, HCCL_ERROR = 507899, 4
BACKGROUND = ("HcclGetCommAsyncError",)
NEVER, TRIES = "did not happen", 5


@dataclass(frozen=True)
class Fault:
    operation: str
    rank: int
    call: str
    nth: int

    @property
    def rules(self) -> str:
        code = HCCL_ERROR if self.call.startswith("Hccl") else DRIVER_ERROR
        return f"{self.call}:{self.nth}:{code}"


def keep_log(worker: Any, on: bool) -> list[str]:
    log = [] if on else control.call_log()
    control.keep_call_log(on)
    return log


def fault_hits(worker: Any) -> int:
    return control.fault_hits()


class Sweep:
    """One engine, and what it has gone through: faults that an operation reported, or made good,
    or that did not happen since the call did not come."""

    def __init__(self, llm: Any, level: int, tokens: Callable[[], Any]) -> None:
        self.llm, self.tokens = llm, tokens
        self.operations = {"sleep": lambda: llm.sleep(level=level), "wake": self._wake}
        self._level = level
        self.results: Counter[str] = Counter()
        self.expected = tokens()

    def _wake(self) -> None:
        self.llm.wake_up()

    def faults(self) -> Iterator[Fault]:
        """Of one cycle, by what each rank calls in each of three: torch_npu's own threads call now
        and then. Not in the first one: some calls come once."""
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
        """One cycle with the fault, or a few where its call does not come at once."""
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
                try:
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
    """The ranks take turns."""
    chosen: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        if fault.nth == 1:
            chosen.setdefault((fault.operation, fault.call), []).append(fault)
    return [same[i % len(same)] for i, same in enumerate(chosen.values())]


def main() -> None:
    from engines import engine
    from reference import PROMPTS, vllm_greedy

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sample", action="store_true")
    options = parser.parse_args()
    results = {}
    with engine(
        options.model,
        enable_sleep_mode=True,
        enable_nccl_comm_suspend=True,
        # Each sleep pins host memory anew, so that those calls are among them.
        additional_config={"sleep_mode": {"keep_host_backup": False}},
        distributed_executor_backend="mp",
        tensor_parallel_size=RANKS,
    ) as llm:
        for level in (1, 2):
            sweep = Sweep(llm, level, lambda: vllm_greedy(llm, PROMPTS[:1], 4))
            faults = list(sweep.faults())
            if options.sample:
                faults = first_of_each_name(iter(faults))
            start = time.monotonic()
            for fault in faults:
                sweep.run(fault)
            results[f"level {level}"] = {
                "faults": len(faults),
                **sweep.results,
                "seconds": round(time.monotonic() - start, 1),
            }
            print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
