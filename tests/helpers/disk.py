# SPDX-License-Identifier: Apache-2.0
"""The nameless files that a process has open in a directory."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import MIB
from helpers.patience import patience


def nameless_files(directory: Path, pid: int | str = "self") -> list[Path]:
    """Their entries in /proc, through which they can be opened. None has a name."""
    return list(_open_files(directory, pid))


def _open_files(directory: Path, pid: int | str) -> Iterator[Path]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target.startswith(f"{directory}/"):
            assert target.endswith("(deleted)"), target
            yield entry


def spoil(directory: Path) -> int:
    """Change a byte of each MiB of this process's files in the directory; a second call changes
    them back. Returns how many."""
    changed = 0
    for entry in nameless_files(directory):
        with entry.open("r+b") as file:
            for offset in range(0, os.fstat(file.fileno()).st_size, MIB):
                (byte,) = os.pread(file.fileno(), 1, offset)
                os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
                changed += 1
            os.fsync(file.fileno())
    return changed


# A process with 24 MiB of weights, and what it can do with them. ``held_at`` returns once the
# operation is in the call.
_OPERATES = """
import sys, threading, time
from helpers import MIB, allocator
from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.sim import control

allocator.start()
allocator.configure(threads=1, backup_dir=sys.argv[1], place=sys.argv[2])
blocks = [allocator.Block("weights", 8 * MIB, seed) for seed in range(3)]
sleep = lambda place="", commit=True: _camem.sleep(allocator.LEVEL_1, place=place, commit=commit)
wake = lambda: _camem.wake(list(allocator.TAGS))

def held_at(call, nth, operation):
    control.reset_counters()
    control.set_faults(f"{call}:{nth}:delay_ms=600000")
    threading.Thread(target=operation, daemon=True).start()
    while control.fault_hits() == 0:
        time.sleep(0.001)

exec(sys.argv[3])
print("ready", flush=True)
time.sleep(600)
"""


def leaves_no_file_if_killed(directory: Path, place: str, operations: str, machine: str) -> None:
    """Kill a process, whose sleeps go to ``place``, after these operations. It has a file for its
    weights until then, and nothing is left of it."""
    with subprocess.Popen(
        [sys.executable, "-c", _OPERATES, str(directory), place, operations],
        env={**os.environ, "NPU_SIM_MACHINE": machine},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            (file,) = nameless_files(directory, child.pid)
            assert file.stat().st_size == 24 * MIB
            assert list(directory.iterdir()) == []
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(60 * patience())
    assert list(directory.iterdir()) == []
    assert not Path(f"/proc/{child.pid}").exists()
