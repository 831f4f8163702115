# SPDX-License-Identifier: Apache-2.0
"""AscendCL through ctypes, for the tests of the simulator: every call returns its code."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
HUGE = 2 * MIB

SUCCESS = 0
INVALID_PARAM = 100000
RT_PARAM = 107000
DEVICE_ID = 107001
NO_CONTEXT = 107002
OTHER_CONTEXT = 107003
NO_TIMESTAMP = 107006
MEMORY_TYPE = 107016
HANDLE = 107017
UNSUPPORTED = 207000
OUT_OF_MEMORY = 207001
NO_DEVICE = 207004
NO_RESOURCE = 207005
INTERNAL = 500000
NOT_SET = 507007
SYNC_TIMEOUT = 507046
DRIVER = 507899
ALREADY_REGISTERED = 507910
NOT_REGISTERED = 507911

HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = range(5)
DDR_MEM, HBM_MEM = 0, 1
HBM_HUGE, HBM_NORMAL, HBM_HUGE1G, HBM_P2P_HUGE1G = 4, 5, 10, 11
REGISTER_MAPPED, REGISTER_PINNED = 0x2, 0x10000000


class Location(ctypes.Structure):
    _fields_ = [("id", c_uint32), ("type", ctypes.c_int)]


class PhysicalMemProp(ctypes.Structure):
    _fields_ = [
        ("handleType", ctypes.c_int),
        ("allocationType", ctypes.c_int),
        ("memAttr", ctypes.c_int),
        ("location", Location),
        ("reserve", c_uint64),
    ]


def prop(attribute: int = HBM_HUGE, device: int = 0, location: int = 1) -> PhysicalMemProp:
    return PhysicalMemProp(0, 0, attribute, Location(device, location), 0)


library = ctypes.CDLL("libascendcl.so")
library.aclGetRecentErrMsg.restype = c_char_p


def call(name: str, *arguments: Any) -> int:
    """Call a function. Addresses and handles may be plain integers."""
    converted = [c_void_p(a) if isinstance(a, int) and a >= 1 << 32 else a for a in arguments]
    return getattr(library, name)(*converted)


def ok(name: str, *arguments: Any) -> None:
    code = call(name, *arguments)
    assert code == SUCCESS, f"{name}: {code}: {message()}"


def message() -> str:
    return (library.aclGetRecentErrMsg() or b"").decode()


def reserve(size: int) -> int:
    address = c_void_p()
    args = (c_size_t(size), c_size_t(0), None, c_uint64(1))
    ok("aclrtReserveMemAddress", byref(address), *args)
    return address.value or 0


def malloc_physical(size: int, property: PhysicalMemProp | None = None) -> tuple[int, int]:
    handle = c_void_p()
    code = call(
        "aclrtMallocPhysical",
        byref(handle),
        c_size_t(size),
        byref(property or prop()),
        c_uint64(0),
    )
    return code, handle.value or 0


def physical(size: int) -> int:
    code, handle = malloc_physical(size)
    assert code == SUCCESS, message()
    return handle


def map_mem(address: int, size: int, handle: int) -> int:
    return call("aclrtMapMem", address, c_size_t(size), c_size_t(0), handle, c_uint64(0))


@dataclass
class Mapped:
    """A reservation with one handle mapped at its start."""

    address: int
    size: int
    handle: int

    def free(self) -> None:
        ok("aclrtUnmapMem", self.address)
        ok("aclrtFreePhysical", self.handle)
        ok("aclrtReleaseMemAddress", self.address)


def mapped(size: int = HUGE) -> Mapped:
    result = Mapped(reserve(size), size, physical(size))
    assert map_mem(result.address, size, result.handle) == SUCCESS, message()
    return result


def malloc(size: int) -> tuple[int, int]:
    pointer = c_void_p()
    return call("aclrtMalloc", byref(pointer), c_size_t(size), 0), pointer.value or 0


def malloc_host(size: int) -> int:
    pointer = c_void_p()
    ok("aclrtMallocHost", byref(pointer), c_size_t(size))
    return pointer.value or 0


def memcpy(to: int, source: int, count: int, kind: int, room: int | None = None) -> int:
    room = count if room is None else room
    return call("aclrtMemcpy", to, c_size_t(room), source, c_size_t(count), kind)


def memcpy_async(
    to: int, source: int, count: int, kind: int, stream: int | None, room: int | None = None
) -> int:
    room = count if room is None else room
    return call("aclrtMemcpyAsync", to, c_size_t(room), source, c_size_t(count), kind, stream)


def stream() -> int:
    handle = c_void_p()
    ok("aclrtCreateStream", byref(handle))
    return handle.value or 0


def streams_left() -> int:
    count = c_uint32()
    ok("aclrtGetStreamAvailableNum", byref(count))
    return count.value


def event(flags: int = 1 | 8) -> int:
    """An event that streams can wait for (1) and that records its time (8)."""
    handle = c_void_p()
    ok("aclrtCreateEventExWithFlag", byref(handle), c_uint32(flags))
    return handle.value or 0


def elapsed_ms(start: int, end: int) -> tuple[int, float]:
    result = c_float()
    return call("aclrtEventElapsedTime", byref(result), start, end), result.value


def free_and_total(attribute: int = HBM_MEM) -> tuple[int, int]:
    free, total = c_size_t(), c_size_t()
    ok("aclrtGetMemInfo", attribute, byref(free), byref(total))
    return free.value, total.value


def stream_is_idle(handle: int) -> bool:
    status = c_int32(-1)
    ok("aclrtStreamQuery", handle, byref(status))
    return status.value == 0


def bytes_at(address: int, count: int) -> bytes:
    return ctypes.string_at(address, count)


HostFunction = ctypes.CFUNCTYPE(None, c_void_p)
_kept: list[Any] = []  # functions that a stream may still be running


@contextmanager
def held(queue: int) -> Iterator[threading.Event]:
    """Hold the stream until the event is set or the block ends."""
    released = threading.Event()
    _kept.append(HostFunction(lambda _: released.wait()))
    ok("aclrtLaunchHostFunc", queue, _kept[-1], None)
    try:
        yield released
    finally:
        released.set()


def run_python(
    code: str, timeout: float = 30, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a separate process, on device 0, with everything of this module imported."""
    prelude = "from helpers.ascendcl import *\nimport os, sys, time\nok('aclrtSetDevice', 0)\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
