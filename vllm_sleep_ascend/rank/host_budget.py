# SPDX-License-Identifier: Apache-2.0
"""Checks that a host has memory, or disk space, for the backups of all its ranks, before any rank
allocates.

A rank alone sees all of the host's free memory and disk, so each rank would find them enough.
"""

import os
import socket
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sleep_ascend.errors import DiskError, HostOutOfMemoryError
from vllm_sleep_ascend.policy import Action, Place

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

    from vllm_sleep_ascend.memory.backend import CamemBackend

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a rank is about to take of a disk, and those that are free."""

    directory: str
    device: int  # st_dev of the directory, the same for all directories of a file system
    needed: int
    available: int


@dataclass(frozen=True)
class HostNeed:
    """What a rank is about to allocate. ``needed`` and ``available`` are bytes; ``available`` is
    what the machine or the rank's control group has left. ``disk`` is None where backups do not go
    there. ``moves``: a backup comes from disk."""

    rank: int
    host: tuple[str, str]  # boot id and name: containers on a machine have separate limits
    needed: int
    available: int
    disk: DiskNeed | None = None
    moves: bool = False


def ranks_of_this_host(parallel: "ParallelConfig") -> int:
    """The number of ranks, including those of data-parallel engines started with this one."""
    return parallel.local_world_size * max(1, parallel.data_parallel_size_local)


def this_host() -> tuple[str, str]:
    """Boot id and name: containers on a machine share the first."""
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return boot_id, socket.gethostname()


def host_need(
    backend: "CamemBackend",
    rank: int,
    actions: Mapping[str, Action],
    place: Place | None = None,
) -> HostNeed:
    """What a sleep with these actions to this place needs on this rank, beyond what it holds."""
    return HostNeed(
        rank,
        this_host(),
        *backend.host_need(actions, place=place),
        disk=_disk_need(backend, actions, place),
        moves=place == "host" and any(tag["asleep_on_disk"] for tag in backend.usage().values()),
    )


def _disk_need(
    backend: "CamemBackend", actions: Mapping[str, Action], place: Place | None
) -> DiskNeed | None:
    """A directory that does not answer needs nothing: the rank's own sleep fails, and says why."""
    try:
        need = backend.disk_need(actions, place=place)
        return None if need is None else DiskNeed(need[0], os.stat(need[0]).st_dev, *need[1:])
    except OSError:
        return None


def check_together(needs: Iterable[HostNeed]) -> None:
    """
    Raises:
        HostOutOfMemoryError: the ranks of a host need more memory than it has.
        DiskError: the ranks of a host need more space than a disk has. Either is the same on every
            rank.
    """
    hosts: dict[tuple[str, str], list[HostNeed]] = {}
    disks: dict[Hashable, list[tuple[HostNeed, DiskNeed]]] = {}
    for need in needs:
        hosts.setdefault(need.host, []).append(need)
        if need.disk is not None:
            # Containers on a machine may share a disk.
            disks.setdefault((need.host[0], need.disk.device), []).append((need, need.disk))
    for (_, name), ranks in hosts.items():
        needed = [rank.needed for rank in ranks]
        available = min(rank.available for rank in ranks)
        if sum(needed) > available:
            otherwise = "use level 2, which keeps no backup of the weights"
            if any(rank.moves for rank in ranks):
                otherwise = "leave the backups on disk"
            error = HostOutOfMemoryError(
                f"the backups of ranks {_listed(ranks)} on host {name} need {_summed(needed)} "
                f"bytes of host memory together and {available} are available; free host memory, "
                f"or {otherwise}. Nothing was touched"
            )
            error.needed_bytes, error.free_bytes = sum(needed), available
            raise error
    for shares in disks.values():
        ranks, needs_of_disk = [rank for rank, _ in shares], [disk for _, disk in shares]
        needed = [disk.needed for disk in needs_of_disk]
        available = min(disk.available for disk in needs_of_disk)
        if sum(needed) > available:
            short = DiskError(
                f"the backups of ranks {_listed(ranks)} on host {ranks[0].host[1]} need "
                f"{_summed(needed)} bytes in {needs_of_disk[0].directory} (backup_dir) together "
                f"and {available} are free; free disk space, choose another backup_dir, or use "
                "level 2, which keeps no backup of the weights. Nothing was touched"
            )
            short.needed_bytes, short.free_bytes = sum(needed), available
            raise short


def _listed(ranks: Sequence[HostNeed]) -> str:
    return ", ".join(str(rank.rank) for rank in ranks)


def _summed(needed: Sequence[int]) -> str:
    return f"{' + '.join(map(str, needed))} = {sum(needed)}"
