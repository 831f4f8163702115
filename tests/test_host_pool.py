# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory of backups: exact, wherever it comes from, and within the limits there are."""

import os
import subprocess
import sys
from pathlib import Path

import core
import pytest
from support import MIB

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.sim import control

NOT_SUPPORTED, NO_RESOURCE = 207000, 207005
SIZES = (2, 6, 10)  # MiB; chunks are 4 MiB


@pytest.fixture
def weights():
    core.start()
    core.configure()
    blocks = [core.Block("weights", mib * MIB, seed) for seed, mib in enumerate(SIZES)]
    yield blocks
    control.set_faults("")
    for block in blocks:
        block.free()
    assert _camem.pinned_host_bytes() == 0


def sleep_and_wake(blocks) -> None:
    _camem.sleep(core.LEVEL_1)
    assert _camem.pinned_host_bytes() == sum(SIZES) * MIB
    _camem.wake(list(core.TAGS))
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
    _camem.sleep(core.LEVEL_1)
    assert _camem.pinned_host_bytes() == sum(SIZES[:-1]) * MIB
    _camem.wake(list(core.TAGS))
    assert all(block.intact() for block in weights)


def test_without_a_kept_backup_host_memory_goes_back_at_the_wake(weights):
    core.configure(keep_host_backup=False)
    _camem.sleep(core.LEVEL_1)
    _camem.wake(list(core.TAGS))
    assert _camem.pinned_host_bytes() == 0


def test_host_memory_that_a_control_group_around_this_process_leaves_is_what_is_available():
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in groups if ":memory:" in line), None)
    v2 = next((line.split(":", 2)[2] for line in groups if line.startswith("0::")), None)
    root, limit = (
        (Path("/sys/fs/cgroup/memory") / own.lstrip("/"), "memory.limit_in_bytes")
        if own is not None
        else (Path("/sys/fs/cgroup") / (v2 or "/").lstrip("/"), "memory.max")
    )
    outer = root / f"camem-{os.getpid()}"
    try:
        (outer / "inner").mkdir(parents=True)
        (outer / limit).write_text(str(512 * MIB))
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    code = (
        "import os, sys, pathlib\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from vllm_sleep_ascend import _camem\n"
        "print(_camem.available_host_bytes())\n"
    )
    command = [sys.executable, "-c", code, str(outer / "inner")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        (outer / "inner").rmdir()
        outer.rmdir()
    assert 100 * MIB < int(done.stdout) <= 512 * MIB
