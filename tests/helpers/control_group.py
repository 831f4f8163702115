# SPDX-License-Identifier: Apache-2.0
"""Limits of host memory as in containers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def control_group(limit: int, processes: list[int]) -> Iterator[None]:
    """Put the processes two levels below a control group with this memory limit, in bytes."""
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in groups if ":memory:" in line), None)
    v2 = next((line.split(":", 2)[2] for line in groups if line.startswith("0::")), "/")
    root, name = (
        (Path("/sys/fs/cgroup/memory") / own.lstrip("/"), "memory.limit_in_bytes")
        if own is not None
        else (Path("/sys/fs/cgroup") / v2.lstrip("/"), "memory.max")
    )
    outer = root / f"camem-{os.getpid()}"
    inner = outer / "inner"

    def move(to: Path) -> None:
        for process in processes:
            with suppress(ProcessLookupError):  # it has ended
                (to / "cgroup.procs").write_text(str(process))

    try:
        inner.mkdir(parents=True)
        (outer / name).write_text(str(limit))
        move(inner)
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        yield
    finally:
        move(root)
        inner.rmdir()
        outer.rmdir()
