# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory of backups: exact, wherever it comes from, and within the limits there are."""

import os
import subprocess
import sys

import pytest
from helpers import MIB, ROOT, allocator
from helpers.control_group import control_group

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.sim import control

NOT_SUPPORTED, NO_RESOURCE = 207000, 207005
SIZES = (2, 6, 10)  # MiB; chunks are 4 MiB


@pytest.fixture
def weights():
    allocator.start()
    allocator.configure()
    blocks = [allocator.Block("weights", mib * MIB, seed) for seed, mib in enumerate(SIZES)]
    yield blocks
    control.set_faults("")
    for block in blocks:
        block.free()
    assert _camem.pinned_host_bytes() == 0


def sleep_and_wake(blocks) -> None:
    _camem.sleep(allocator.LEVEL_1)
    assert _camem.pinned_host_bytes() == sum(SIZES) * MIB
    _camem.wake(list(allocator.TAGS))
    assert all(block.intact() for block in blocks)


def test_a_backup_has_exactly_the_bytes_of_what_sleeps(weights):
    before = control.counters().registered_bytes
    sleep_and_wake(weights)
    assert control.counters().registered_bytes - before == sum(SIZES) * MIB


@pytest.mark.parametrize(
    ("rule", "registered_mib"),
    [
        (f"aclrtHostRegisterV2:1:{NOT_SUPPORTED}:*,aclrtHostRegister:1:{NOT_SUPPORTED}:*", 0),
        (f"aclrtHostRegisterV2:1:{NO_RESOURCE}:*,aclrtHostRegister:1:{NO_RESOURCE}:*", 0),
        # What is registered when the limit is met stays; the last of six chunks comes otherwise.
        (f"aclrtHostRegisterV2:6:{NO_RESOURCE}:*,aclrtHostRegister:1:{NO_RESOURCE}:*", None),
    ],
    ids=["not available", "nothing may be registered", "a limit on registered memory"],
)
def test_where_registering_is_refused_memory_is_allocated_pinned(weights, rule, registered_mib):
    before = control.counters()
    control.set_faults(rule)
    sleep_and_wake(weights)
    after = control.counters()
    registered = after.registered_bytes - before.registered_bytes
    allocated = after.pinned_bytes - before.pinned_bytes
    if registered_mib is None:
        assert 0 < allocated <= 4 * MIB
    else:
        assert registered == registered_mib * MIB
    assert registered + allocated == sum(SIZES) * MIB


def test_prepared_blocks_are_what_the_sleep_takes(weights):
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(30)
    assert _camem.pinned_host_bytes() == sum(SIZES) * MIB
    control.keep_call_log(True)
    sleep_and_wake(weights)
    log = control.call_log()
    control.keep_call_log(False)
    assert not any("HostRegister" in call for call in log)
    assert sum(call == "aclrtMemcpyAsync" for call in log) == 2 * 6


def test_prepared_blocks_that_nothing_needs_any_more_are_given_back(weights):
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(30)
    weights.pop().free()  # 10 of 18 MiB
    _camem.sleep(allocator.LEVEL_1)
    assert _camem.pinned_host_bytes() == sum(SIZES[:-1]) * MIB
    _camem.wake(list(allocator.TAGS))
    assert all(block.intact() for block in weights)


def test_without_a_kept_backup_host_memory_goes_back_at_the_wake(weights):
    allocator.configure(keep_host_backup=False)
    _camem.sleep(allocator.LEVEL_1)
    _camem.wake(list(allocator.TAGS))
    assert _camem.pinned_host_bytes() == 0


class Child:
    """A process with 24 MiB of weights, in a control group with this limit from then on."""

    def __init__(self, code: str, limit: int):
        prepare = (
            "import threading\n"
            "from helpers import allocator\n"
            "from helpers import MIB\n"
            "from vllm_sleep_ascend import _camem\n"
            "from vllm_sleep_ascend.errors import HostOutOfMemoryError\n"
            "from vllm_sleep_ascend.sim import control\n"
            "allocator.start()\n"
            "allocator.configure(threads=1)\n"
            "blocks = [allocator.Block('weights', 8 * MIB, seed) for seed in range(3)]\n"
            "print('ready', flush=True)\n"
            "input()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", prepare + code],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            with control_group(limit, [process.pid]):
                self.output, _ = process.communicate("\n", timeout=60)
        finally:
            process.kill()
            process.wait()
        self.exit_code = process.returncode


def test_host_memory_that_a_control_group_around_this_process_leaves_is_what_is_available():
    child = Child("print(_camem.available_host_bytes())\n", 512 * MIB)
    assert 400 * MIB < int(child.output) <= 512 * MIB


def test_what_others_take_while_a_backup_is_pinned_ends_the_sleep_and_not_the_process():
    """The first block of six is registered, and meanwhile somebody takes the memory of the
    others: they would not fit into the control group."""
    child = Child(
        "control.set_faults('aclrtHostRegisterV2:1:delay_ms=60000')\n"
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
