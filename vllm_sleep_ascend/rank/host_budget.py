# SPDX-License-Identifier: Apache-2.0
"""Checks that a host has memory for the backups of all its ranks, before any rank allocates.

A rank alone sees all of the host's free memory, so each rank would find it enough.
"""

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sleep_ascend.errors import HostOutOfMemoryError
from vllm_sleep_ascend.policy import Action

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

    from vllm_sleep_ascend.memory.backend import CamemBackend

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class HostNeed:
    """What a rank is about to allocate. ``needed`` and ``available`` are bytes; ``available`` is
    what the machine or the rank's control group has left."""

    rank: int
    host: tuple[str, str]  # boot id and name: containers on a machine have separate limits
    needed: int
    available: int


def ranks_of_this_host(parallel: "ParallelConfig") -> int:
    """The number of ranks, including those of data-parallel engines started with this one."""
    return parallel.local_world_size * max(1, parallel.data_parallel_size_local)


def host_need(backend: "CamemBackend", rank: int, actions: Mapping[str, Action]) -> HostNeed:
    """What a sleep with these actions needs on this rank, beyond what it holds already."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return HostNeed(rank, (boot_id, socket.gethostname()), *backend.host_need(actions))


def check_together(needs: Iterable[HostNeed]) -> None:
    """
    Raises:
        HostOutOfMemoryError: the ranks of a host need more than it has; the same on every rank.
    """
    hosts: dict[tuple[str, str], list[HostNeed]] = {}
    for need in needs:
        hosts.setdefault(need.host, []).append(need)
    for (_, name), ranks in hosts.items():
        needed = sum(rank.needed for rank in ranks)
        available = min(rank.available for rank in ranks)
        if needed <= available:
            continue
        error = HostOutOfMemoryError(
            f"the backups of ranks {', '.join(str(rank.rank) for rank in ranks)} on host {name} "
            f"need {' + '.join(str(rank.needed) for rank in ranks)} = {needed} bytes of host "
            f"memory together and {available} are available; free host memory, or use level 2, "
            "which keeps no backup of the weights. Nothing was touched"
        )
        error.needed_bytes, error.free_bytes = needed, available
        raise error
