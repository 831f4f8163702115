# SPDX-License-Identifier: Apache-2.0
"""Random operations compared with a simple model of contents and states.

``CAMEM_RANDOM_STEPS=10000`` runs that many steps with new random seeds; by default a fixed subset
runs.
"""

import os
import subprocess
import sys

import pytest
from helpers import MIB, allocator
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import DeviceOutOfMemoryError, SleepModeError
from vllm_sleep_ascend.sim import control

STEPS_A_RUN = 50
CALLS = (
    "aclrtMallocPhysical",
    "aclrtMapMem",
    "aclrtUnmapMem",
    "aclrtFreePhysical",
    "aclrtMemcpyAsync",
    "aclrtMemcpyAsync.work",
    "aclrtSynchronizeStreamWithTimeout",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtFreeHost",
    "aclrtGetMemInfo",
)
TAG = st.sampled_from(allocator.TAGS)
ACTION = st.sampled_from(("keep", "offload", "discard"))

NEIGHBOUR = """
import ctypes, sys
acl = ctypes.CDLL("libascendcl.so")
acl.aclInit(None)
acl.aclrtSetDevice(0)
held = ctypes.c_void_p()
for line in sys.stdin:
    if held:
        acl.aclrtFree(held)
        held = ctypes.c_void_p()
    if int(line) and acl.aclrtMalloc(ctypes.byref(held), ctypes.c_size_t(int(line)), 0) != 0:
        held = ctypes.c_void_p()
    print("done", flush=True)
"""


class Allocator(RuleBasedStateMachine):
    """The model knows for each block whether it is awake, and its expected content, if any."""

    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        allocator.start()
        allocator.configure(keep_host_backup=True, chunk_mib=2)
        self.start = control.counters()
        self.alive: list[allocator.Block] = []
        self.asleep: dict[int, str] = {}  # address -> "offloaded" or "discarded"
        self.known: set[int] = set()  # addresses whose content is known
        self.neighbour = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def teardown(self):
        control.set_faults("")
        self.neighbour.stdin.close()
        self.neighbour.wait()
        for block in self.alive:
            block.free()
        _camem.wake([])
        after = control.counters()
        assert after.device_bytes == self.start.device_bytes
        assert after.physical_handles == self.start.physical_handles
        assert after.mappings == self.start.mappings
        assert after.reservations == self.start.reservations
        assert _camem.pinned_host_bytes() == 0

    @rule(target=blocks, tag=TAG, mib=st.integers(1, 9), content=st.integers(0, 5))
    def allocate(self, tag, mib, content):
        try:
            block = allocator.Block(tag, mib * MIB, content)
        except MemoryError:
            return None
        self.alive.append(block)
        self.known.add(block.address)
        return block

    @rule(block=consumes(blocks))
    def free(self, block):
        if block is not None:
            block.free()
            self.alive.remove(block)
            self.asleep.pop(block.address, None)
            self.known.discard(block.address)

    @rule(block=blocks, content=st.integers(0, 5))
    def write(self, block, content):
        if block is not None and block.address not in self.asleep:
            block.write(content)
            self.known.add(block.address)

    @rule(plan=st.dictionaries(TAG, ACTION), otherwise=ACTION)
    def sleep(self, plan, otherwise):
        if not self.attempt(lambda: _camem.sleep(plan, otherwise)):
            for block in self.alive:  # scratch has lost its content, mapped again or not
                if block.tag in allocator.SCRATCH and plan.get(block.tag, otherwise) == "discard":
                    self.known.discard(block.address)
            return
        for block in self.alive:
            action = plan.get(block.tag, otherwise)
            if action == "discard":
                self.asleep[block.address] = "discarded"
                self.known.discard(block.address)
            elif action == "offload" and block.address not in self.asleep:
                self.asleep[block.address] = "offloaded"

    @rule(tags=st.sets(TAG))
    def wake(self, tags):
        if self.attempt(lambda: _camem.wake(sorted(tags))):
            for block in self.alive:
                if block.tag in tags:
                    self.asleep.pop(block.address, None)

    @rule(keep=st.booleans())
    def configure(self, keep):
        allocator.configure(keep_host_backup=keep, chunk_mib=2)

    @rule(mib=st.sampled_from((0, 100, 400, 500)))
    def neighbour_takes(self, mib):
        self.neighbour.stdin.write(f"{mib * MIB}\n")
        self.neighbour.stdin.flush()
        assert self.neighbour.stdout.readline() == "done\n"

    @rule(
        call=st.sampled_from(CALLS),
        nth=st.integers(1, 6),
        code=st.sampled_from((507899, 207001)),
    )
    def fault(self, call, nth, code):
        control.set_faults(f"{call}:{nth}:{code}")

    @rule()
    def end_faults(self):
        control.set_faults("")

    def attempt(self, operation) -> bool:
        """Return whether it succeeded. A failure must not change any state."""
        try:
            operation()
            return True
        except DeviceOutOfMemoryError as error:
            assert error.needed_bytes > 0
        except SleepModeError as error:
            assert "repeated" in str(error) or "nothing is lost" in str(error)
        self.settle()
        return False

    def settle(self) -> None:
        """After a double fault, blocks that were awake may sleep: adopt the allocator's states,
        provided that nothing was lost."""
        for block in self.alive:
            state = block.state
            if state == "discarded":
                scratch = block.tag in allocator.SCRATCH and block.address not in self.asleep
                assert scratch or self.asleep.get(block.address) == "discarded"
                self.asleep[block.address] = "discarded"
            elif state == "offloaded":
                self.asleep[block.address] = "offloaded"

    @precondition(lambda self: self.alive)
    @invariant()
    def states_and_contents_are_as_modelled(self):
        states = {a["address"]: a for a in _camem.allocations()}
        assert len(states) == len(self.alive)
        for block in self.alive:
            info = states[block.address]
            assert info["state"] == self.asleep.get(block.address, "mapped")
            if info["state"] == "offloaded":
                assert info["host_bytes"] >= block.size

    @precondition(lambda self: self.alive)
    @rule()
    def read(self):
        control.set_faults("")
        for block in self.alive:
            if block.address not in self.asleep and block.address in self.known:
                assert block.intact()


@pytest.mark.timeout(3000)
def test_random_operations_match_the_model():
    steps = int(os.environ.get("CAMEM_RANDOM_STEPS", "0"))
    fixed = steps == 0
    profile = settings(
        max_examples=(steps or 1500) // STEPS_A_RUN,
        stateful_step_count=STEPS_A_RUN,
        deadline=None,
        database=None,
        derandomize=fixed,
        phases=(Phase.generate,) if fixed else (Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(Allocator, settings=profile)
    assert control.counters().mappings == 0
