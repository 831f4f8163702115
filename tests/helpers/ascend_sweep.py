# SPDX-License-Identifier: Apache-2.0
"""Every AscendCL call of a sleep and a wake fails once, through vllm-ascend's allocator class.

    PYTHONPATH=tests npu-sim python -m helpers.ascend_sweep [own]

With ``own`` it is vllm-ascend's allocator, otherwise ours. Three weight tensors and two KV-cache
tensors sleep at level 1 and wake. One call fails with 507899, and the failed operation is retried
once. Each fault has a separate process, because some faults end it, and some calls happen only once
in a process.
"""

import json
import os
import sys
from collections import Counter
from typing import Any

import torch

from helpers import MIB
from helpers.faults import DRIVER_ERROR, calls_of
from vllm_sleep_ascend.sim import control

ASKED_ONLY = ("aclrtGetDevice", "aclrtGetCurrentContext")  # queries of the thread, not the device
OUTCOMES = ("survived", "lost", "aborted", "stuck", "never")  # never: the call did not happen


def allocator(own: bool) -> Any:
    from vllm_ascend.device_allocator import camem

    if not own:
        from vllm_sleep_ascend.beside.allocator import install

        install()
    return camem.CaMemAllocator.get_instance()


class World:
    """Three weights and two caches that sleep and wake through the allocator."""

    def __init__(self, own: bool):
        memory = allocator(own)
        self.weights = []
        with memory.use_memory_pool(tag="weights"):
            for seed, mib in enumerate((10, 12, 14)):
                dice = torch.Generator().manual_seed(seed)
                content = torch.randint(0, 255, (mib * MIB,), dtype=torch.uint8, generator=dice)
                self.weights.append((content.npu(), content))
        with memory.use_memory_pool(tag="kv_cache"):
            self.caches = [
                torch.ones(mib * MIB, dtype=torch.uint8, device="npu") for mib in (10, 12)
            ]
        torch.npu.synchronize()
        self.operations = {
            "sleep": lambda: memory.sleep(offload_tags=("weights",)),
            "wake": memory.wake_up,
        }

    def calls(self) -> dict[str, list[str]]:
        """The AscendCL calls of each operation."""
        calls = {}
        for name, operation in self.operations.items():
            calls[name] = calls_of(operation)
        return calls

    def outcome(self, faulty: str, call: str, nth: int) -> str:
        """The outcome of a cycle in which that call of one operation fails."""
        for name, operation in self.operations.items():
            control.set_faults(f"{call}:{nth}:{DRIVER_ERROR}" if name == faulty else "")
            try:
                operation()
                if name == faulty and control.fault_hits() == 0:
                    return "never"
            except Exception:
                control.set_faults("")
                try:
                    operation()
                except Exception:
                    return "stuck"
            control.set_faults("")
        for cache in self.caches:
            cache.fill_(2)
        intact = all(torch.equal(tensor.cpu(), content) for tensor, content in self.weights)
        return "survived" if intact else "lost"


def in_a_process(own: bool, fault: tuple[str, str, int] | None) -> Any:
    """The outcome of a fault, or without one the calls; None if the process ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            world = World(own)
            answer = world.calls() if fault is None else world.outcome(*fault)
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(answer))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def sweep(own: bool) -> dict[str, Counter]:
    """Outcomes by call, for every call of a sleep and a wake.

    The number of copying lanes, and so of waits for a stream, differs from run to run: the last of
    these calls may happen in only one of them.
    """
    runs = [in_a_process(own, None) for _ in range(3)]
    calls = min(runs, key=lambda calls: sum(map(len, calls.values())))
    faults = [
        (operation, call, nth)
        for operation, names in calls.items()
        for call, times in Counter(names).items()
        for nth in range(1, times + 1)
        if call not in ASKED_ONLY
    ]
    table: dict[str, Counter] = {}
    for fault in faults:
        for _ in range(20):
            outcome = in_a_process(own, fault) or "aborted"
            if outcome != "never":
                break
        table.setdefault(fault[1], Counter())[outcome] += 1
    return table


if __name__ == "__main__":
    for call, outcomes in sweep("own" in sys.argv[1:]).items():
        print("ROW", call, *(outcomes[outcome] for outcome in OUTCOMES))
