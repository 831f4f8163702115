# SPDX-License-Identifier: Apache-2.0
"""The measured allocators with one interface: use_pool, sleep (keeps the weights), wake."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import build
from bench.machine import MIB, Machine, summary

# The default options, and what differs from them. Host memory is from aclrtMallocHost, as on the
# kernels of most NPU hosts.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_on_demand": {"prepare": False},
    "ours_lock": {"prepare": False, "unprepared": "lock"},
    "ours_stage": {"prepare": False, "unprepared": "stage"},
    "ours_registered": {"host_memory": "registered"},
    "ours_registered_lock": {"host_memory": "registered", "prepare": False, "unprepared": "lock"},
    "ours_skip_unchanged": {"skip": True},
    "ours_released": {"keep": False},
    "ours_disk": {"prepare": False, "disk": True},
    "ours_disk_registered": {"prepare": False, "disk": True, "host_memory": "registered"},
}
PEERS = ("cumem", "tms", "tms_retain", "tms_disk")


class Allocator(Protocol):
    def use_pool(self, tag: str) -> AbstractContextManager[None]: ...
    def prepare(self) -> None: ...
    def sleep(self) -> None: ...
    def wake(self, tags: list[str], timeout_s: float = 0.0) -> None: ...
    def figures(self) -> dict[str, Any]: ...


class Ours:
    """vllm_sleep_ascend's compiled allocator. ``variant`` chooses the options."""

    def __init__(
        self,
        machine: Machine,
        variant: str,
        chunk_mib: int,
        directory: Path | None,
        disk_blocks_mib: int,
    ) -> None:
        self._machine = machine
        self.camem = build.load(machine.name)
        from vllm_sleep_ascend.policy import POLICY, SCRATCH_TAGS

        self._actions = POLICY[1]
        options = OURS[variant]
        self._skip = options.get("skip", False)
        self._prepares = options.get("prepare", True)
        self._pools: list[Any] = []
        self._checksum_s: list[float] = []
        self.camem.configure(
            chunk_bytes=chunk_mib * MIB,
            keep_host_backup=options.get("keep", True),
            copy_threads=3,
            host_threads=16,
            host_memory=options.get("host_memory", "acl"),
            unprepared=options.get("unprepared", "measured"),
            scratch_tags=list(SCRATCH_TAGS),
            place="disk" if options.get("disk") else "host",
            backup_dir=str(directory) if options.get("disk") else "",
            disk_blocks_bytes=disk_blocks_mib * MIB,
        )
        self._hooks: Any = None
        if machine.name == "cuda":
            self._hooks = torch.cuda.memory.CUDAPluggableAllocator(
                self.camem.__file__, "camem_malloc", "camem_free"
            )

    @contextmanager
    def use_pool(self, tag: str) -> Iterator[None]:
        if self._hooks is None:
            from vllm_sleep_ascend.memory import pool

            with pool.use_pool(tag):
                yield
            return
        self._pools.append(torch.cuda.MemPool(self._hooks.allocator()))
        before = self.camem.set_current_tag(tag)
        with torch.cuda.use_mem_pool(self._pools[-1]):
            yield
        self.camem.set_current_tag(before)

    def prepare(self) -> None:
        if self._prepares:
            self.camem.prepare(["weights"], slowly=True)
            self.camem.wait_prepared(600.0)

    def sleep(self) -> None:
        self._machine.synchronize()
        sums = self._checksums() if self._skip else {}
        self.camem.sleep(self._actions, "offload", sums)

    def discard_all(self) -> None:
        """Free everything without copying, which is the time of the driver alone."""
        self._machine.synchronize()
        self.camem.sleep({}, "discard")

    def wake(self, tags: list[str], timeout_s: float = 0.0) -> None:
        self.camem.wake(tags, timeout_s)

    def figures(self) -> dict[str, Any]:
        figures = {
            "pinned_bytes": self.camem.pinned_host_bytes(),
            "plain_bytes": self.camem.plain_host_bytes(),
            "host_memory": self.camem.host_memory(),
        }
        return {**figures, "checksums_s": summary(self._checksum_s)} if self._skip else figures

    def _checksums(self) -> dict[int, int]:
        from vllm_sleep_ascend.memory.checksum import checksums

        start = self._machine.now()
        ranges = [
            (allocation["address"], allocation["bytes"])
            for allocation in self.camem.allocations()
            if allocation["state"] == "mapped" and self._actions[allocation["tag"]] == "offload"
        ]
        sums = checksums(ranges, self._machine.device)
        self._checksum_s.append(self._machine.now() - start)
        return sums


class Cumem:
    """vLLM's own allocator for CUDA."""

    def __init__(self) -> None:
        sys.path.insert(0, str(build.PEERS))
        from vllm.device_allocator.cumem import CuMemAllocator

        self._allocator = CuMemAllocator.get_instance()

    def use_pool(self, tag: str) -> AbstractContextManager[None]:
        return self._allocator.use_memory_pool(tag)

    def prepare(self) -> None: ...

    def sleep(self) -> None:
        self._allocator.sleep(("weights",))

    def wake(self, tags: list[str], timeout_s: float = 0.0) -> None:
        self._allocator.wake_up(tags)

    def figures(self) -> dict[str, Any]:
        return {}


class MemorySaver:
    """torch_memory_saver; ``retain`` keeps its host backup between sleeps, and with ``directory``
    the backup is on disk."""

    def __init__(self, retain: bool, directory: Path | None = None) -> None:
        self._on_disk = directory is not None
        if retain:
            os.environ["TMS_RETAIN_CPU_BACKUP"] = "1"
        if directory is not None:
            os.environ["TMS_DISK_BACKUP_DIR"] = str(directory)
        sys.path.insert(0, str(build.PEERS))
        from torch_memory_saver import torch_memory_saver

        self._saver = torch_memory_saver
        self._saver.hook_mode = "torch"

    @contextmanager
    def use_pool(self, tag: str) -> Iterator[None]:
        kept = "enable_disk_backup" if self._on_disk else "enable_cpu_backup"
        with self._saver.region(tag=tag, **{kept: tag == "weights"}):
            yield

    def prepare(self) -> None: ...

    def sleep(self) -> None:
        self._saver.pause("kv_cache")
        self._saver.pause("weights")

    def wake(self, tags: list[str], timeout_s: float = 0.0) -> None:
        for tag in tags:
            self._saver.resume(tag)

    def figures(self) -> dict[str, Any]:
        return {}


def make(
    name: str,
    machine: Machine,
    chunk_mib: int = 64,
    directory: Path | None = None,
    disk_blocks_mib: int = 256,
) -> Allocator:
    """``directory`` and ``disk_blocks_mib`` are for those whose backup is on disk."""
    if name == "cumem":
        return Cumem()
    if name in ("tms", "tms_retain", "tms_disk"):
        return MemorySaver(name == "tms_retain", directory if name == "tms_disk" else None)
    return Ours(machine, name, chunk_mib, directory, disk_blocks_mib)
