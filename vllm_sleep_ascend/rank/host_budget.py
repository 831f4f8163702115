# SPDX-License-Identifier: Apache-2.0
"""Host memory for the backups of all ranks of one host, before any of them takes some.

Each rank alone sees all that the host has left, and each would find it enough.
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
    """What one rank is about to take. ``needed`` and ``available`` are bytes; ``available`` is what
    the machine or the rank's control group has left."""

    rank: int
    host: tuple[str, str]  # boot id and name: containers of one machine have limits of their own
    needed: int
    available: int


def ranks_of_this_host(parallel: "ParallelConfig") -> int:
    """Of all data-parallel engines that were started with this one."""
    return parallel.local_world_size * max(1, parallel.data_parallel_size_local)


def host_need(backend: "CamemBackend", rank: int, actions: Mapping[str, Action]) -> HostNeed:
    """Of a sleep by these actions on this rank, beyond what is held already."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return HostNeed(rank, (boot_id, socket.gethostname()), *backend.host_need(actions))


def check_together(needs: Iterable[HostNeed]) -> None:
    """
    Raises:
        HostOutOfMemoryError: the ranks of one host need more than it has; the same on every rank.
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
