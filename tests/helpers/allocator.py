# SPDX-License-Identifier: Apache-2.0
"""The compiled allocator without torch: hooks through ctypes, memory through aclrtMemcpy."""

import ctypes
import hashlib
import random
from typing import Literal

from helpers import MIB
from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.memory.host import page_locked_source

_H2D, _D2H = 1, 2

_hooks = ctypes.CDLL(_camem.__file__)
_hooks.camem_malloc.restype = ctypes.c_void_p
_hooks.camem_malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
_hooks.camem_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
_acl = ctypes.CDLL("libascendcl.so")
_acl.aclrtMemcpy.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
]

LEVEL_1 = {"weights": "offload", "runtime": "offload", "kv_cache": "discard"}
LEVEL_2 = {**LEVEL_1, "weights": "discard"}
TAGS = ("weights", "runtime", "kv_cache")


def start(device: int = 0) -> None:
    """Make the device current on this thread."""
    _acl.aclInit(None)
    assert _acl.aclrtSetDevice(device) == 0


SCRATCH = ("kv_cache",)


def configure(
    keep_host_backup: bool = True,
    chunk_mib: int = 4,
    threads: int = 2,
    scratch: tuple[str, ...] = SCRATCH,
    host_memory: str = "auto",
    unprepared: str = "measured",
    device_timeout_s: float = 60.0,
    backup_dir: str = "",
    disk_blocks_mib: int = 16,
    place: Literal["host", "disk"] | None = None,
) -> None:
    """``place`` is the disk if there is a directory for backups."""
    source, why = page_locked_source(host_memory)
    _camem.configure(
        chunk_bytes=chunk_mib * MIB,
        keep_host_backup=keep_host_backup,
        copy_threads=threads,
        host_threads=threads,
        host_memory=source,
        why_host_memory=why,
        unprepared=unprepared,
        device_timeout_s=device_timeout_s,
        scratch_chunk_bytes=chunk_mib * MIB,
        scratch_tags=list(scratch),
        place=place or ("disk" if backup_dir else "host"),
        backup_dir=backup_dir,
        disk_blocks_bytes=disk_blocks_mib * MIB,
    )


class Block:
    """An allocation through the hooks, with known content."""

    def __init__(self, tag: str, size: int, seed: int = 0, device: int = 0):
        self.tag, self.size, self.device = tag, size, device
        previous = _camem.set_current_tag(tag)
        self.address = _hooks.camem_malloc(size, device, None)
        _camem.set_current_tag(previous)
        if self.address is None:
            raise MemoryError(f"no device memory for {size} bytes")
        self.write(seed)

    def write(self, seed: int) -> None:
        content = random.Random(seed).randbytes(self.size)
        self.digest = hashlib.sha1(content).digest()
        assert _acl.aclrtMemcpy(self.address, self.size, content, self.size, _H2D) == 0

    def read(self) -> bytes:
        content = ctypes.create_string_buffer(self.size)
        assert _acl.aclrtMemcpy(content, self.size, self.address, self.size, _D2H) == 0
        return content.raw

    def intact(self) -> bool:
        return hashlib.sha1(self.read()).digest() == self.digest

    @property
    def state(self) -> str:
        return next(a["state"] for a in _camem.allocations() if a["address"] == self.address)

    def free(self) -> None:
        _hooks.camem_free(self.address, self.size, self.device, None)
