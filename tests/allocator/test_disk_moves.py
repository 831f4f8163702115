# SPDX-License-Identifier: Apache-2.0
"""Backups that move between host memory and disk while they sleep: what the host holds, the status,
and what a killed process leaves.

The system calls of a move fail one by one in tests/cpp/disk_faults_test.cpp.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import MIB, allocator
from helpers.disk import leaves_no_file_if_killed, nameless_files, spoil
from helpers.logs import messages_of
from helpers.patience import patience, wait_for

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.errors import DiskError, SleepModeError
from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory

# MiB, in chunks of 4 MiB. From 64 MiB on, the first sleep measures how host memory is best taken,
# and other tests of this process would go by that.
SIZES = (4, 20, 36)
TOTAL = sum(SIZES) * MIB


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[list[allocator.Block]]:
    allocator.start()
    allocator.configure(backup_dir=str(tmp_path), place="host", keep_host_backup=False)
    blocks = [allocator.Block("weights", mib * MIB, seed) for seed, mib in enumerate(SIZES)]
    yield blocks
    for block in blocks:
        block.free()
    held = nameless_files(tmp_path), _camem.pinned_host_bytes(), _camem.plain_host_bytes()
    allocator.configure()
    assert held == ([], 0, 0) and list(tmp_path.iterdir()) == []


def sleep(place: str = "") -> Any:
    return _camem.sleep(allocator.LEVEL_1, place=place)  # type: ignore[arg-type]


def wake(blocks: list[allocator.Block]) -> None:
    _camem.wake(list(allocator.TAGS))
    assert all(block.intact() for block in blocks)


def asleep() -> tuple[int, int]:
    """Bytes that sleep with their backup in host memory, and on disk."""
    allocations = _camem.allocations()
    return (
        sum(a["asleep_in_host_bytes"] for a in allocations),
        sum(a["asleep_on_disk_bytes"] for a in allocations),
    )


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_host_memory_is_free_after_a_move_to_disk(weights, tmp_path) -> None:
    awake = resident()
    sleep()
    assert asleep() == (TOTAL, 0)
    assert _camem.pinned_host_bytes() + _camem.plain_host_bytes() == TOTAL
    before = resident()
    report = sleep("disk")
    assert report["tags"]["weights"]["moved"] == TOTAL
    assert report["tags"]["weights"]["offloaded"] == 0
    assert asleep() == (0, TOTAL)
    assert _camem.pinned_host_bytes() == _camem.plain_host_bytes() == 0
    # The simulated device's memory is this process's too. The key of the digests takes 8 MiB.
    assert resident() <= min(awake, before - TOTAL) + 24 * MIB
    (file,) = nameless_files(tmp_path)
    assert file.stat().st_size == TOTAL and file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == []
    assert sleep("disk")["tags"] == {}
    wake(weights)
    assert asleep() == (0, 0) and nameless_files(tmp_path) == []


def test_a_backup_comes_back_to_host_memory(weights, tmp_path) -> None:
    sleep("disk")
    assert asleep() == (0, TOTAL)
    assert sleep("host")["tags"]["weights"]["moved"] == TOTAL
    assert asleep() == (TOTAL, 0)
    assert _camem.pinned_host_bytes() + _camem.plain_host_bytes() == TOTAL
    assert nameless_files(tmp_path) == []
    wake(weights)


def test_what_changed_on_the_disk_does_not_come_back(weights, tmp_path) -> None:
    sleep("disk")
    spoil(tmp_path)
    for _ in range(2):
        with pytest.raises(DiskError, match=r"not what was written.*everything is as it was"):
            sleep("host")
        assert asleep() == (0, TOTAL)
        assert sum(a["host_bytes"] for a in _camem.allocations()) == 0
    spoil(tmp_path)
    sleep("host")
    wake(weights)


def test_a_move_needs_a_directory(weights, tmp_path) -> None:
    sleep()
    allocator.configure(keep_host_backup=False)
    with pytest.raises(SleepModeError, match=r"no directory is set \(backup_dir\)"):
        sleep("disk")
    assert asleep() == (TOTAL, 0)
    wake(weights)


def memory_with(directory: Path, **options: Any) -> SleepingMemory:
    memory = SleepingMemory()
    sizes = {"chunk_mib": 4, "disk_blocks_mib": 16}
    memory.configure(SleepModeConfig(backup_dir=str(directory), **sizes, **options))
    return memory


def test_what_a_move_needs_is_known_before_it(weights, tmp_path) -> None:
    memory = memory_with(tmp_path)
    actions = dict(allocator.LEVEL_1)

    def needs(place) -> tuple[int, int | None]:
        on_disk = memory.disk_need(actions, place=place)
        return memory.host_need(actions, place=place)[0], on_disk and on_disk[1]

    assert needs(None) == (TOTAL, None)
    assert needs("disk") == (0, TOTAL)
    memory.sleep("sleep", actions)
    assert needs(None) == (0, None)
    assert needs("disk") == (0, TOTAL)
    with messages_of("memory.sleeping_memory"):
        memory.sleep("sleep", actions, place="disk")
    usage = memory.usage()["weights"]
    assert (usage["asleep_in_host"], usage["asleep_on_disk"], usage["host"]) == (0, TOTAL, 0)
    assert memory.last_operation is not None
    assert memory.last_operation["copied_bytes"] == 0  # over the link
    assert needs(None) == (0, None)
    assert needs("disk") == (0, 0)
    assert needs("host") == (TOTAL, None)
    memory.wake(list(allocator.TAGS))
    memory.sleep("sleep", actions)  # to where the options say
    usage = memory.usage()["weights"]
    assert (usage["asleep_in_host"], usage["disk"]) == (TOTAL, TOTAL)  # the file is kept
    assert needs("disk") == (0, 0)
    memory.sleep("sleep", actions, place="disk")  # the file has it all already
    moved = memory.last_operation["tags"]["weights"]
    assert (moved["moved"], moved["written"]) == (TOTAL, 0)
    memory.wake(list(allocator.TAGS))
    assert all(block.intact() for block in weights)


@pytest.mark.parametrize("host_backup", ["auto", "prepared"])
def test_a_sleep_to_disk_gives_prepared_host_memory_back(weights, tmp_path, host_backup) -> None:
    memory = memory_with(tmp_path, host_backup=host_backup)
    _camem.prepare(["weights"])
    assert _camem.wait_prepared(60 * patience())
    assert _camem.host_memory()["prepared"] == TOTAL
    memory.sleep("sleep", dict(allocator.LEVEL_1), place="disk")
    wait_for(lambda: _camem.pinned_host_bytes() == _camem.host_memory()["disk_staging"])
    assert _camem.host_memory()["prepared"] == 0
    memory.wake(list(allocator.TAGS))
    assert all(block.intact() for block in weights)


def test_a_sleep_to_disk_that_is_aborted_leaves_prepared_host_memory(weights, tmp_path) -> None:
    memory = memory_with(tmp_path)
    memory.commits_at_once = False
    _camem.prepare(["weights"])
    memory.sleep("sleep", dict(allocator.LEVEL_1), place="disk")
    assert memory.abort() == ""
    memory.wake(list(allocator.TAGS))
    memory.commit()
    assert _camem.wait_prepared(60 * patience())
    assert _camem.host_memory()["prepared"] == TOTAL
    _camem.release_prepared()
    assert all(block.intact() for block in weights)


FREE = "'aclrtFreeHost' if _camem.host_memory()['source'] == 'acl' else 'aclrtHostUnregister'"
TAKE = "'aclrtMallocHost' if _camem.host_memory()['source'] == 'acl' else 'aclrtHostRegisterV2'"
PHASES = {
    "prepared to disk": "sleep(); sleep('disk', commit=False)",
    "while it frees host memory": f"sleep(); held_at({FREE}, 2, lambda: sleep('disk'))",
    "moved": "sleep(); sleep('disk')",
    "while it reads into host memory": f"sleep('disk'); held_at({TAKE}, 2, lambda: sleep('host'))",
    "while it writes and reads": (
        "sleep('disk'); places = ('host', 'disk'); "
        "move = lambda: [sleep(place) for _ in iter(int, 1) for place in places]; "
        "threading.Thread(target=move, daemon=True).start(); time.sleep(0.2)"
    ),
    "prepared to host": "sleep('disk'); sleep('host', commit=False)",
    "in host memory with a kept file": "sleep('disk'); sleep('host')",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_process_killed_in_a_move_leaves_no_file(phase, tmp_path) -> None:
    machine = f"moves-{os.getpid()}-{[*PHASES].index(phase)}"
    leaves_no_file_if_killed(tmp_path, "host", PHASES[phase], machine)
