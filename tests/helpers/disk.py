# SPDX-License-Identifier: Apache-2.0
"""The nameless files that a process has open in a directory."""

import os
from collections.abc import Iterator
from pathlib import Path

from helpers import MIB


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
