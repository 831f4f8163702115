# SPDX-License-Identifier: Apache-2.0
"""Backups on disk: what the host holds, what errors say, and what a killed process leaves.

The system calls fail one by one in tests/cpp/disk_faults_test.cpp.
"""

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import MIB, allocator
from helpers.disk import leaves_no_file_if_killed, nameless_files, spoil
from helpers.logs import messages_of

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.errors import DiskError, SleepModeError
from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory

SIZES = (2, 6, 10)  # MiB; chunks are 4 MiB
TOTAL = sum(SIZES) * MIB


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[list[allocator.Block]]:
    allocator.start()
    allocator.configure(backup_dir=str(tmp_path))
    blocks = [allocator.Block("weights", mib * MIB, seed) for seed, mib in enumerate(SIZES)]
    yield blocks
    for block in blocks:
        block.free()
    assert nameless_files(tmp_path) == [] and list(tmp_path.iterdir()) == []
    assert _camem.pinned_host_bytes() == _camem.plain_host_bytes() == 0
    allocator.configure()


def sleep() -> None:
    _camem.sleep(allocator.LEVEL_1)


def wake(blocks: list[allocator.Block]) -> None:
    _camem.wake(list(allocator.TAGS))
    assert all(block.intact() for block in blocks)


def on_disk() -> int:
    return sum(a["disk_bytes"] for a in _camem.allocations())


def test_the_host_holds_the_blocks_and_no_more(weights, tmp_path) -> None:
    for _ in range(2):
        sleep()
        assert on_disk() == TOTAL
        assert sum(a["host_bytes"] for a in _camem.allocations()) == 0
        assert _camem.pinned_host_bytes() == _camem.host_memory()["disk_staging"] == 16 * MIB
        assert list(tmp_path.iterdir()) == []
        (file,) = nameless_files(tmp_path)
        assert file.stat().st_size == TOTAL and file.stat().st_mode & 0o777 == 0o600
        wake(weights)
        assert _camem.pinned_host_bytes() == 0


def test_only_what_changed_is_written_to_a_kept_file(weights, tmp_path) -> None:
    def written() -> int:
        report = _camem.sleep(allocator.LEVEL_1)
        assert report["tags"]["weights"]["offloaded"] == TOTAL  # copied from the device
        wake(weights)
        return report["tags"]["weights"]["written"]

    assert [written(), written()] == [TOTAL, 0]
    weights[1].write(5)
    assert [written(), written()] == [SIZES[1] * MIB, 0]
    weights[1].write(1)
    assert written() == SIZES[1] * MIB
    (file,) = nameless_files(tmp_path)
    assert file.stat().st_size == TOTAL


def test_an_open_file_does_not_pass_to_programs_that_are_started(weights, tmp_path) -> None:
    sleep()
    listed = ["ls", "-l", "/proc/self/fd"]
    found = subprocess.run(listed, capture_output=True, text=True, close_fds=False).stdout
    assert str(tmp_path) not in found
    wake(weights)


def test_sleeping_content_is_read_from_the_disk(weights) -> None:
    block = weights[2]
    awake = block.read()
    sleep()
    assert _camem.read_backup(block.address, block.size) == awake
    assert _camem.read_backup(block.address + 5 * MIB, MIB) == awake[5 * MIB : 6 * MIB]
    wake(weights)


def test_spoilt_content_is_never_served(weights, tmp_path) -> None:
    sleep()
    assert spoil(tmp_path) == TOTAL // MIB
    for _ in range(2):
        with pytest.raises(DiskError, match="not what was written") as refused:
            wake(weights)
        text = str(refused.value)
        assert f"{tmp_path} (backup_dir" in text and "at offset" in text
        assert "sleep at level 2, wake and load them" in text
        assert refused.value.tag == "weights"
        assert {block.state for block in weights} == {"offloaded"}
        assert sum(a["device_bytes"] for a in _camem.allocations()) == 0
    with pytest.raises(DiskError, match="not what was written"):
        _camem.read_backup(weights[0].address, 1)
    spoil(tmp_path)
    wake(weights)


def test_a_file_that_may_not_be_so_large_leaves_all_awake(weights) -> None:
    """The process's own limit on files; Python ignores its signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(DiskError, match=r"everything is as it was.*repeated") as refused:
            sleep()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in str(refused.value)
    assert all(block.state == "mapped" and block.intact() for block in weights)
    assert on_disk() == 0
    sleep()
    wake(weights)


def test_the_status_and_the_log_say_where_backups_lie(weights, tmp_path) -> None:
    memory = SleepingMemory()
    memory.configure(
        SleepModeConfig(
            host_backup="disk", backup_dir=str(tmp_path), chunk_mib=4, disk_blocks_mib=16
        )
    )
    directory, needed, free = memory.disk_need(allocator.LEVEL_1) or ("", 0, 0)
    assert (directory, needed) == (str(tmp_path), TOTAL) and free > TOTAL
    assert memory.host_need(allocator.LEVEL_1)[0] == 0
    memory.prepare()
    assert _camem.host_memory()["prepared"] == 0
    with messages_of("memory.sleeping_memory") as warnings:
        memory.sleep("sleep", dict(allocator.LEVEL_1))
        usage = memory.usage()["weights"]
        assert (usage["host"], usage["disk"], usage["offloaded"]) == (0, TOTAL, TOTAL)
        status = memory.disk_backup()
        assert status is not None
        assert (status["directory"], status["bytes"]) == (str(tmp_path), TOTAL)
        assert status["blocks"] == 16 * MIB
        memory.wake(list(allocator.TAGS))
        memory.sleep("sleep", dict(allocator.LEVEL_1))
        memory.wake(list(allocator.TAGS))
    # Said once, where the file system of the test refuses O_DIRECT.
    assert len(warnings) == (1 if status["why_not_direct"] else 0)
    assert all(block.intact() for block in weights)
    directory, needed, free = memory.disk_need(allocator.LEVEL_1) or ("", 1, 0)
    assert (directory, needed) == (str(tmp_path), 0) and free > 0


def test_a_start_names_a_directory_that_is_missing(tmp_path) -> None:
    missing = tmp_path / "missing"
    config = SleepModeConfig(host_backup="disk", backup_dir=str(missing))
    with pytest.raises(ValueError, match=f"backup_dir='{missing}': no file can be created in it"):
        SleepingMemory().configure(config)


PHASES = {
    "asleep": "sleep()",
    "prepared": "_camem.sleep(allocator.LEVEL_1, commit=False)",
    "while it writes": "held_at('aclrtMemcpyAsync', 2, sleep)",
    "while it commits": "held_at('aclrtFreePhysical', 2, sleep)",
    "while it wakes": "sleep(); held_at('aclrtMemcpyAsync', 2, wake)",
    "prepared to wake": "sleep(); _camem.wake(list(allocator.TAGS), commit=False)",
    "awake with a kept file": "sleep(); wake()",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_process_leaves_no_file(phase, tmp_path) -> None:
    machine = f"disk-{os.getpid()}-{[*PHASES].index(phase)}"
    leaves_no_file_if_killed(tmp_path, "disk", PHASES[phase], machine)


def test_disk_errors_are_errors_of_sleep_mode() -> None:
    assert issubclass(DiskError, SleepModeError)
