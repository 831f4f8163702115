# SPDX-License-Identifier: Apache-2.0
"""Every AscendCL call of every operation fails once: nothing is lost, nothing leaks, and the
operation can be retried."""

from collections import Counter
from dataclasses import dataclass

import pytest
from helpers import MIB, allocator, faults
from helpers.faults import DRIVER_ERROR, OUT_OF_MEMORY

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.sim import control

MAY_RUN_OUT = ("aclrtMallocPhysical", "aclrtMallocHost", "aclrtReserveMemAddress")


@dataclass(frozen=True)
class Operation:
    name: str
    asleep_by: dict[str, str] | None  # what sleeps before the operation starts
    plan: dict[str, str] | None  # sleep by this plan ...
    tags: tuple[str, ...] = ()  # ... or wake these tags
    otherwise: str = "offload"

    def run(self) -> None:
        if self.plan is None:
            _camem.wake(list(self.tags))
        else:
            _camem.sleep(self.plan, self.otherwise)


OPERATIONS = [
    Operation("sleep level 1", None, allocator.LEVEL_1),
    Operation("sleep level 2", None, allocator.LEVEL_2),
    Operation("sleep level 2 after level 1", allocator.LEVEL_1, allocator.LEVEL_2),
    Operation("discard kv_cache", None, {"kv_cache": "discard"}, otherwise="keep"),
    Operation("wake all", allocator.LEVEL_1, None, allocator.TAGS),
    Operation("wake weights", allocator.LEVEL_1, None, ("weights", "runtime")),
    Operation("wake kv_cache", allocator.LEVEL_1, None, ("kv_cache", "runtime")),
    Operation("wake all after level 2", allocator.LEVEL_2, None, allocator.TAGS),
]


@pytest.fixture(autouse=True)
def device():
    allocator.start()
    allocator.configure()
    yield
    control.set_faults("")


class World:
    """Three weights, one runtime tensor and two caches, each with several chunks."""

    def __init__(self, operation: Operation):
        self.before = control.counters()
        sizes = {"weights": (2, 6, 10), "runtime": (2,), "kv_cache": (8, 6)}
        self.blocks = [
            allocator.Block(tag, mib * MIB, seed=seed)
            for tag, mibs in sizes.items()
            for seed, mib in enumerate(mibs)
        ]
        self.forgotten: set[str] = set()
        if operation.asleep_by is not None:
            _camem.sleep(operation.asleep_by)
            self.forget(operation.asleep_by)

    def forget(self, plan: dict[str, str]) -> None:
        self.forgotten |= {tag for tag, action in plan.items() if action == "discard"}

    def check(self) -> None:
        """Every mapped block has its content, unless a completed operation discarded it."""
        for block in self.blocks:
            if block.state == "mapped" and block.tag not in self.forgotten:
                assert block.intact(), f"{block.tag} lost its content"
            if block.state == "discarded":
                assert block.tag in self.forgotten, f"{block.tag} was discarded"

    def end(self) -> None:
        for block in self.blocks:
            block.free()
        after = control.counters()
        assert after.device_bytes == self.before.device_bytes
        assert after.physical_handles == self.before.physical_handles
        assert after.mappings == self.before.mappings
        assert after.reservations == self.before.reservations
        assert after.pinned_bytes == self.before.pinned_bytes
        assert _camem.allocations() == []
        assert _camem.pinned_host_bytes() == 0


def calls_of(operation: Operation) -> Counter:
    world = World(operation)
    calls = Counter(faults.calls_of(operation.run))
    if operation.plan:
        world.forget(operation.plan)
    world.check()
    world.end()
    return calls


def fail_at(operation: Operation, rules: str) -> tuple[bool, int]:
    """Run the operation with these faults, then retry it without.

    Returns whether the first run failed, and the number of its calls.
    """
    world = World(operation)
    control.set_faults(rules)
    failed = False
    try:
        operation.run()
    except SleepModeError as error:
        failed = True
        assert any(word in str(error) for word in ("can be repeated", "comes back with wake_up"))
    hits = control.fault_hits()
    control.set_faults("")
    if operation.plan:
        # A failed sleep maps scratch memory again without its content.
        scratch = {tag: operation.plan.get(tag, "keep") for tag in allocator.SCRATCH}
        world.forget(scratch if failed else operation.plan)
    world.check()
    operation.run()
    if operation.plan:
        world.forget(operation.plan)
    world.check()
    _camem.wake(list(allocator.TAGS))
    assert all(block.state == "mapped" for block in world.blocks)
    world.check()
    world.end()
    return failed, hits


def choose_host_memory_again(operation: Operation) -> None:
    """As a new process would: after a block that cannot be registered, no other one is."""
    allocator.configure(host_memory="acl")
    allocator.configure()
    calls_of(operation)


THOROUGH = pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "all"]
)


@THOROUGH
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_call_may_fail_once(operation, thorough, record_property):
    calls_of(operation)  # streams are made once
    # The number of copying lanes, and so of waits for a stream, differs from run to run: the last
    # of these calls may happen in only one of them.
    runs = [calls_of(operation) for _ in range(5)]
    source = _camem.host_memory()["source"]
    cases = failed = hits = 0
    for call, times in min(runs, key=Counter.total).items():
        for nth in range(1, times + 1) if thorough else {1, times}:
            for code in (DRIVER_ERROR, *([OUT_OF_MEMORY] if call in MAY_RUN_OUT else [])):
                if _camem.host_memory()["source"] != source:
                    choose_host_memory_again(operation)
                for _ in range(50):
                    reported, hit = fail_at(operation, f"{call}:{nth}:{code}")
                    if hit:
                        break
                failed, hits, cases = failed + reported, hits + hit, cases + 1
    record_property("cases", cases)
    print(f"{operation.name}: {cases} faults, {failed} reported, {cases - failed} made good")
    assert hits == cases >= 5


@THOROUGH
@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS if operation.name != "sleep level 2 after level 1"],
    ids=lambda operation: operation.name,
)
def test_a_second_fault_during_the_roll_back_loses_nothing(operation, thorough):
    """Two faults a few calls apart: the second one hits the rollback of the first."""
    calls = calls_of(operation)
    pairs = [
        f"{call}:{nth}:{DRIVER_ERROR},{other}:{1 + (nth + shift) % (times + 3)}:{DRIVER_ERROR}"
        for call, times in calls.items()
        for nth in range(1, times + 1, 3)
        for shift, other in enumerate(calls)
        if any(word in other for word in ("Memcpy", "MapMem", "UnmapMem", "MallocPhysical"))
    ]
    assert len(pairs) >= 2
    for rules in pairs if thorough else pairs[:: len(pairs) // 5 + 1]:
        fail_at(operation, rules)


@pytest.mark.parametrize("call", ["aclrtUnmapMem", "aclrtFreePhysical"])
def test_a_free_that_fails_is_made_good_by_a_later_operation(call):
    before = control.counters()
    block = allocator.Block("weights", 6 * MIB)
    control.set_faults(f"{call}:1:{DRIVER_ERROR}:*")
    block.free()
    assert control.counters().device_bytes > before.device_bytes
    control.set_faults("")
    allocator.Block("weights", 2 * MIB).free()
    assert control.counters() == before


@pytest.mark.parametrize(
    ("call", "nth"),
    [
        ("aclrtReserveMemAddress", 1),
        ("aclrtMallocPhysical", 1),
        ("aclrtMallocPhysical", 2),
        ("aclrtMapMem", 1),
        ("aclrtMapMem", 2),
    ],
)
def test_an_allocation_that_fails_leaves_nothing(call, nth):
    before = control.counters()
    control.set_faults(f"{call}:{nth}:{OUT_OF_MEMORY}")
    with pytest.raises(MemoryError):
        allocator.Block("weights", 10 * MIB)
    assert control.counters() == before


def test_an_error_names_call_code_bytes_tag_and_device():
    from vllm_sleep_ascend.errors import AclError

    block = allocator.Block("weights", 4 * MIB)
    control.set_faults(f"aclrtMemcpyAsync:1:{DRIVER_ERROR}")
    with pytest.raises(AclError, match="tag 'weights' on device 0: aclrtMemcpyAsync failed") as e:
        _camem.sleep(allocator.LEVEL_1)
    assert e.value.call == "aclrtMemcpyAsync"
    assert e.value.code == DRIVER_ERROR
    assert e.value.needed_bytes == 4 * MIB
    assert "ACL_ERROR_RT_DRV_INTERNAL_ERROR" in str(e.value)
    assert block.intact()
    block.free()
