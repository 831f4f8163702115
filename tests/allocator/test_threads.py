# SPDX-License-Identifier: Apache-2.0
"""Threads that allocate, free and query while another one sleeps and wakes."""

import threading
import time
from collections.abc import Callable

import pytest
from helpers import MIB, allocator
from helpers.patience import patience, wait_for

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.sim import control

WEIGHTS_ONLY = ({"weights": "offload"}, "keep")
SLOW_COPY = "aclrtMemcpyAsync:1:delay_ms=2000"
HELD_COPY = "aclrtMemcpyAsync:1:delay_ms=60000"  # or until there are other rules


@pytest.fixture(autouse=True)
def device():
    import torch

    allocator.start()
    torch.npu.empty_cache()  # otherwise a test here frees what other tests left
    allocator.configure(chunk_mib=2)
    before = control.counters()
    yield
    control.set_faults("")
    after = control.counters()
    assert after.device_bytes == before.device_bytes
    assert after.physical_handles == before.physical_handles
    assert after.mappings == before.mappings
    assert after.reservations == before.reservations
    assert after.pinned_bytes == before.pinned_bytes


class Worker(threading.Thread):
    """A thread with a device, which ends in time and passes on its exception."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None
        self.start()

    def run(self):
        allocator.start()
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def done(self, timeout: float = 60) -> None:
        self.join(timeout * patience())
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error


def held_sleep(copy: str = HELD_COPY) -> Worker:
    """A sleep that has begun and is held at a copy until ``let_go``."""
    control.set_faults(copy)
    sleeper = Worker(lambda: _camem.sleep(*WEIGHTS_ONLY))
    wait_for(lambda: control.fault_hits() == 1, "the copy begins")
    return sleeper


def let_go(sleeper: Worker) -> None:
    """Release the sleep, after checking that nothing waited for its end."""
    assert sleeper.is_alive(), "the sleep had to end first"
    control.set_faults("")


def test_threads_allocate_write_and_free_while_another_sleeps_and_wakes():
    weights = [allocator.Block("weights", 4 * MIB, seed) for seed in range(3)]
    finished = []

    def work(number: int) -> None:
        for turn in range(25):
            stays = allocator.Block("stays", 2 * MIB, seed=100 * number + turn)
            passing = _allocate("weights", 2 * MIB)  # may fall asleep before it is freed
            assert stays.intact()
            _free(passing, 2 * MIB)
            stays.free()
        finished.append(number)

    workers = [Worker(lambda number=number: work(number)) for number in range(3)]
    cycles = 0
    while any(worker.is_alive() for worker in workers) or cycles < 3:
        _camem.sleep(*WEIGHTS_ONLY)
        _camem.wake(["weights"])
        cycles += 1
    for worker in workers:
        worker.done()
    assert sorted(finished) == [0, 1, 2]
    assert all(block.state == "mapped" and block.intact() for block in weights)
    for block in weights:
        block.free()
    assert _camem.allocations() == []


def _allocate(tag: str, size: int) -> int:
    previous = _camem.set_current_tag(tag)
    address = allocator._hooks.camem_malloc(size, 0, None)
    _camem.set_current_tag(previous)
    assert address is not None
    return address


def _free(address: int, size: int) -> None:
    allocator._hooks.camem_free(address, size, 0, None)


def test_tags_belong_to_their_thread():
    meeting = threading.Barrier(4, timeout=30 * patience())
    found: dict[str, str] = {}

    def work(tag: str) -> None:
        assert _camem.set_current_tag(tag) == "default"
        meeting.wait()
        address = allocator._hooks.camem_malloc(2 * MIB, 0, None)
        meeting.wait()
        found[tag] = next(a["tag"] for a in _camem.allocations() if a["address"] == address)
        meeting.wait()
        _free(address, 2 * MIB)

    tags = [f"tag of thread {number}" for number in range(4)]
    for worker in [Worker(lambda tag=tag: work(tag)) for tag in tags]:
        worker.done()
    assert found == {tag: tag for tag in tags}


def test_other_python_threads_go_on_during_a_sleep():
    """Even those that call the allocator, if the call need not wait."""
    block = allocator.Block("weights", 4 * MIB)
    sleeper = held_sleep()
    for _ in range(200):
        _camem.set_current_tag(_camem.set_current_tag("runtime"))
        _camem.tags()
        _camem.copied_bytes()
        _camem.pinned_host_bytes()
    let_go(sleeper)
    sleeper.done()
    assert block.state == "offloaded"
    block.free()


@pytest.mark.parametrize("wait", ["configure", "allocations", "malloc", "free"])
def test_what_waits_for_a_sleep_waits_without_the_gil(wait):
    weights = allocator.Block("weights", 4 * MIB, seed=1)
    other = allocator.Block("stays", 2 * MIB)
    sleeper = held_sleep()
    got = []
    begun = threading.Event()
    waiting = {
        "configure": lambda: allocator.configure(chunk_mib=2),
        "allocations": lambda: got.extend(_camem.allocations()),
        "malloc": lambda: got.append(_allocate("stays", 2 * MIB)),
        "free": other.free,
    }[wait]
    waiter = Worker(lambda: (begun.set(), waiting()))
    assert begun.wait(60)
    for _ in range(200):  # would block if the waiter held the GIL
        time.sleep(0.001)
    assert waiter.is_alive(), "it did not wait"
    let_go(sleeper)
    waiter.done()
    sleeper.done()
    states = [allocation["state"] for allocation in _camem.allocations()]
    assert sorted(states) == sorted(
        ["offloaded"] + ["mapped"] * {"malloc": 2, "free": 0}.get(wait, 1)
    )
    _camem.wake(["weights"])
    assert weights.intact()
    weights.free()
    if wait != "free":
        other.free()
    if wait == "malloc":
        _free(got[0], 2 * MIB)


def test_torch_allocates_in_several_threads_while_another_sleeps_and_wakes():
    import torch

    from vllm_sleep_ascend.memory import pool

    torch.npu.init()

    def tensor(tag: str, value: int):
        with pool.use_pool(tag):
            return torch.full((3 * MIB,), value, dtype=torch.uint8, device="npu")

    weights = tensor("weights", 5)
    torch.npu.synchronize()
    sums = []

    def work(number: int) -> None:
        torch.npu.set_device(0)
        for turn in range(8):
            stays = tensor("stays", number + turn)
            sums.append(int(stays.sum(dtype=torch.int64)) == (number + turn) * 3 * MIB)
            del stays

    workers = [Worker(lambda number=number: work(number)) for number in (1, 2)]
    cycles = 0
    while any(worker.is_alive() for worker in workers) or cycles < 3:
        _camem.sleep(*WEIGHTS_ONLY)
        _camem.wake(["weights"])
        cycles += 1
    for worker in workers:
        worker.done()
    assert sums == [True] * 16
    assert int(weights.sum(dtype=torch.int64)) == 5 * 3 * MIB
    del weights
    pool.release_pools()
    assert _camem.allocations() == []
    torch.npu.empty_cache()


def test_torch_neither_deadlocks_with_the_gil_nor_with_its_own_lock():
    """During a sleep one thread allocates (torch's lock, then ours), and another destroys pools
    (the GIL, torch's lock, then ours)."""
    import torch

    from vllm_sleep_ascend.memory import pool

    torch.npu.init()
    with pool.use_pool("weights"):
        weights = torch.full((4 * MIB,), 9, dtype=torch.uint8, device="npu")
    with pool.use_pool("kv_cache"):
        cache = torch.zeros(4 * MIB, dtype=torch.uint8, device="npu")
    torch.npu.synchronize()
    made = []

    def allocate() -> None:
        torch.npu.set_device(0)
        with pool.use_pool("stays"):
            made.append(torch.full((3 * MIB,), 1, dtype=torch.uint8, device="npu"))

    # Destroying a pool keeps the GIL, so nothing in this process could release the sleep.
    sleeper = held_sleep(SLOW_COPY)
    allocating = Worker(allocate)
    del cache
    destroying = Worker(pool.release_pools)
    for worker in (sleeper, allocating, destroying):
        worker.done(60)
    control.set_faults("")
    assert int(made[0].sum(dtype=torch.int64)) == 3 * MIB
    _camem.wake(["weights"])
    assert int(weights.sum(dtype=torch.int64)) == 9 * 4 * MIB
    made.clear()
    del weights
    pool.release_pools()
    torch.npu.empty_cache()  # torch keeps the segment of a tensor that outlived its pool
    assert _camem.allocations() == []
