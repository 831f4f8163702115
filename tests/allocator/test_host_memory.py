# SPDX-License-Identifier: Apache-2.0
"""Host memory of backups: exact, page-locked if possible, and within the limits."""

import subprocess
import sys
import time
from functools import partial

import pytest
from helpers import MIB, allocator
from helpers.control_group import control_group
from helpers.faults import HOST_MEMORY_CODES, OUT_OF_MEMORY
from helpers.patience import patience

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.sim import control

SIZES = (2, 6, 10)  # MiB; chunks are 4 MiB
CHUNKS = 6
TOTAL = sum(SIZES) * MIB
# No chunk gets a page-locked block; each of the two threads has got its two staging blocks.
ONLY_STAGING = f"aclrtMallocHost:5:{OUT_OF_MEMORY}:*"


# On any host, page-locked memory comes from aclrtMallocHost here; test_host_source.py has the rest.
configure = partial(allocator.configure, host_memory="acl")


@pytest.fixture
def weights():
    allocator.start()
    configure()
    blocks = [allocator.Block("weights", mib * MIB, seed) for seed, mib in enumerate(SIZES)]
    yield blocks
    control.set_faults("")
    for block in blocks:
        block.free()
    assert _camem.pinned_host_bytes() == 0
    assert _camem.plain_host_bytes() == 0


def backups() -> tuple[int, int]:
    """Bytes of all backups, and of the page-locked ones."""
    allocations = _camem.allocations()
    return (
        sum(a["host_bytes"] for a in allocations),
        sum(a["page_locked_bytes"] for a in allocations),
    )


def sleep() -> None:
    _camem.sleep(allocator.LEVEL_1)


def wake(blocks) -> None:
    _camem.wake(list(allocator.TAGS))
    assert all(block.intact() for block in blocks)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60 * patience()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_backup_has_exactly_the_bytes_of_what_sleeps_and_is_page_locked(weights):
    before = control.counters().pinned_bytes
    sleep()
    assert control.counters().pinned_bytes - before == TOTAL
    assert backups() == (TOTAL, TOTAL)
    assert _camem.pinned_host_bytes() == TOTAL and _camem.plain_host_bytes() == 0
    wake(weights)


@pytest.mark.parametrize("code", HOST_MEMORY_CODES)
@pytest.mark.parametrize("nth", [1, 4])
def test_what_cannot_be_page_locked_sleeps_in_plain_memory(weights, code, nth):
    """Even if the staging blocks cannot be allocated either."""
    control.set_faults(f"aclrtMallocHost:{nth}:{code}:*")
    sleep()
    size, page_locked = backups()
    assert size == TOTAL and page_locked < TOTAL
    assert (page_locked == 0) == (nth == 1)
    assert _camem.plain_host_bytes() == TOTAL - page_locked
    assert f"aclrtMallocHost failed with {code}" in _camem.host_memory()["failure"]
    wake(weights)
    weights[0].write(7)
    sleep()
    assert backups() == (size, page_locked)
    wake(weights)


@pytest.mark.parametrize("keep", [True, False])
def test_copies_of_plain_backups_go_through_page_locked_blocks(weights, keep):
    configure(unprepared="stage", keep_host_backup=keep)
    copies = 0
    for cycle in range(3):
        control.set_faults(ONLY_STAGING)
        control.reset_counters()
        weights[1].write(cycle)
        sleep()
        assert backups() == (TOTAL, 0)
        assert _camem.host_memory()["staging"] == _camem.pinned_host_bytes() == 8 * MIB
        wake(weights)
        assert backups()[0] == (TOTAL if keep else 0)
        copies += control.call_count("aclrtMemcpyAsync")
    # In pieces of 2 MiB, all asynchronously.
    assert copies == 3 * 2 * TOTAL // (2 * MIB)


def test_plain_backups_become_page_locked_while_asleep(weights):
    configure(unprepared="stage")
    sleep()
    assert backups()[0] == TOTAL
    wait_until(lambda: backups() == (TOTAL, TOTAL))
    control.reset_counters()
    wake(weights)
    assert control.call_count("aclrtMemcpyAsync") == CHUNKS  # whole chunks
    assert _camem.plain_host_bytes() == 0
    assert _camem.host_memory()["staging"] == 0
    sleep()
    wake(weights)


def test_a_wake_does_not_wait_for_a_block_that_is_slow_to_get(weights):
    configure(unprepared="stage")
    sleep()
    control.set_faults("aclrtMallocHost:1:delay_ms=600000:*")
    wait_until(lambda: control.fault_hits() == 1)
    wake(weights)
    weights[0].write(3)
    control.set_faults("")
    sleep()
    wait_until(lambda: backups() == (TOTAL, TOTAL))
    wake(weights)


def test_blocks_that_are_prepared_are_not_for_backups_that_are_there(weights):
    """A sleep needs them for memory without a backup."""
    configure(unprepared="stage")
    control.set_faults(ONLY_STAGING)
    sleep()
    wake(weights)
    control.set_faults("")
    new = allocator.Block("weights", 4 * MIB, 9)
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(60 * patience())
    configure(unprepared="lock")
    sleep()
    wait_until(lambda: backups() == (TOTAL + 4 * MIB,) * 2)
    wake([*weights, new])
    new.free()


def test_preparing_goes_on_after_a_sleep_that_failed(weights):
    control.set_faults("aclrtMallocHost:1:delay_ms=600000:*,aclrtUnmapMem:1:507899")
    _camem.prepare(["weights"], slowly=True)
    wait_until(lambda: control.fault_hits() == 1)
    control.set_faults("aclrtUnmapMem:1:507899")
    with pytest.raises(SleepModeError):
        sleep()
    control.set_faults("")
    wait_until(lambda: _camem.host_memory()["prepared"] + backups()[0] == TOTAL)
    sleep()
    assert backups() == (TOTAL, TOTAL)
    wake(weights)


def test_a_sleep_that_needs_no_backup_of_the_weights_keeps_what_is_prepared_for_them(weights):
    runtime = allocator.Block("runtime", 2 * MIB)
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(60 * patience())
    _camem.sleep(allocator.LEVEL_2)
    assert _camem.host_memory()["prepared"] >= TOTAL - 2 * MIB
    _camem.wake(list(allocator.TAGS))
    assert runtime.intact()
    _camem.release_prepared()
    runtime.free()


def test_prepared_blocks_are_what_the_sleep_takes(weights):
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(60 * patience())
    assert _camem.pinned_host_bytes() == _camem.host_memory()["prepared"] == TOTAL
    control.keep_call_log(True)
    sleep()
    wake(weights)
    log = control.call_log()
    control.keep_call_log(False)
    assert "aclrtMallocHost" not in log
    assert log.count("aclrtMemcpyAsync") == 2 * CHUNKS
    assert backups() == (TOTAL, TOTAL)


def test_blocks_prepared_slowly_are_the_same(weights):
    _camem.prepare(["weights"], slowly=True)
    assert _camem.wait_prepared(60 * patience())
    assert _camem.host_memory()["prepared"] == TOTAL
    sleep()
    assert _camem.host_memory()["prepared"] == 0
    wake(weights)


def test_prepared_blocks_that_nothing_needs_any_more_are_given_back(weights):
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(60 * patience())
    weights.pop().free()  # 10 of 18 MiB
    sleep()
    wait_until(lambda: _camem.pinned_host_bytes() == sum(SIZES[:-1]) * MIB)
    assert backups() == (sum(SIZES[:-1]) * MIB,) * 2
    wake(weights)


def test_prepared_blocks_can_be_given_back_unused(weights):
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(60 * patience())
    _camem.release_prepared()
    wait_until(lambda: _camem.pinned_host_bytes() == 0)
    sleep()
    wake(weights)


def test_without_a_kept_backup_host_memory_goes_back_at_the_wake(weights):
    configure(keep_host_backup=False)
    sleep()
    wake(weights)
    assert _camem.pinned_host_bytes() == 0


class Child:
    """A process with 24 MiB of weights, then put into a control group with this limit."""

    def __init__(self, code: str, limit: int):
        prepare = (
            "import threading\n"
            "from helpers import allocator\n"
            "from helpers import MIB\n"
            "from vllm_sleep_ascend import _camem\n"
            "from vllm_sleep_ascend.errors import HostOutOfMemoryError\n"
            "from vllm_sleep_ascend.sim import control\n"
            "allocator.start()\n"
            "allocator.configure(threads=1, host_memory='acl')\n"
            "blocks = [allocator.Block('weights', 8 * MIB, seed) for seed in range(3)]\n"
            "print('ready', flush=True)\n"
            "input()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", prepare + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            with control_group(limit, [process.pid]):
                self.output, _ = process.communicate("\n", timeout=60 * patience())
        finally:
            process.kill()
            process.wait()
        self.exit_code = process.returncode


def test_host_memory_that_a_control_group_around_this_process_leaves_is_what_is_available():
    child = Child("print(_camem.available_host_bytes())\n", 512 * MIB)
    assert 400 * MIB < int(child.output) <= 512 * MIB


def test_what_others_take_while_a_backup_is_made_ends_the_sleep_and_not_the_process():
    """While the first of six blocks is allocated, another thread takes the memory for the others,
    which then no longer fit into the control group."""
    child = Child(
        "control.set_faults('aclrtMallocHost:1:delay_ms=60000')\n"
        "errors = []\n"
        "def sleep():\n"
        "    try:\n"
        "        _camem.sleep(allocator.LEVEL_1)\n"
        "    except HostOutOfMemoryError as error:\n"
        "        errors.append(error)\n"
        "thread = threading.Thread(target=sleep)\n"
        "thread.start()\n"
        "while control.fault_hits() == 0:\n"
        "    pass\n"
        "taken = b'x' * (_camem.available_host_bytes() - 12 * MIB)\n"
        "control.set_faults('')\n"
        "thread.join()\n"
        "assert 'use level 2' in str(errors[0]), errors\n"
        "assert errors[0].needed_bytes == 20 * MIB and errors[0].free_bytes <= 12 * MIB\n"
        "del taken\n"
        "assert all(block.state == 'mapped' and block.intact() for block in blocks)\n"
        "assert _camem.pinned_host_bytes() == 0\n"
        "_camem.sleep(allocator.LEVEL_1)\n"
        "assert _camem.pinned_host_bytes() == 24 * MIB\n"
        "_camem.wake(list(allocator.TAGS))\n"
        "assert all(block.intact() for block in blocks)\n"
        "print('all is well')\n",
        256 * MIB,
    )
    assert child.output == "all is well\n", child.exit_code


def test_a_copy_that_fails_on_a_stream_of_several_threads_fails_the_sleep(weights):
    """Any of the threads that wait for the stream may get the error."""
    configure(threads=8)
    more = [allocator.Block("weights", 4 * MIB, seed) for seed in range(10)]
    for nth in range(1, CHUNKS + 10 + 1):
        control.set_faults(f"aclrtMemcpyAsync.work:{nth}:507899")
        with pytest.raises(Exception, match="507899"):
            sleep()
        control.set_faults("")
        assert all(block.state == "mapped" and block.intact() for block in weights + more)
    for block in more:
        block.free()
