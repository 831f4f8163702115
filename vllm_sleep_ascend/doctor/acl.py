# SPDX-License-Identifier: Apache-2.0
"""AscendCL through ctypes: calls that raise, and context managers that free what they allocate.

The signatures are those of the headers in the torch_npu wheel. Importing this loads nothing.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
REGISTER_PINNED = 0x10000000
OUT_OF_MEMORY = (200000, 207001, 207018)
NO_DEVICE = 207004
NO_RESOURCE = 207005
SYNC_TIMEOUT = 507046
NOT_SUPPORTED = (200001, 207000)
_DDR, _HBM = 0, 1
_HBM_HUGE, _ON_DEVICE = 4, 1
_GRANULARITY_MINIMUM = 0
_ALREADY_INITIALISED = 100002

NAMES = {
    100000: "ACL_ERROR_INVALID_PARAM",
    107000: "ACL_ERROR_RT_PARAM_INVALID",
    107001: "ACL_ERROR_RT_INVALID_DEVICEID",
    107002: "ACL_ERROR_RT_CONTEXT_NULL",
    107003: "ACL_ERROR_RT_STREAM_CONTEXT",
    107017: "ACL_ERROR_RT_INVALID_HANDLE",
    200000: "ACL_ERROR_BAD_ALLOC",
    200001: "ACL_ERROR_API_NOT_SUPPORT",
    207000: "ACL_ERROR_RT_FEATURE_NOT_SUPPORT",
    207001: "ACL_ERROR_RT_MEMORY_ALLOCATION",
    207004: "ACL_ERROR_RT_NO_DEVICE",
    207005: "ACL_ERROR_RT_RESOURCE_ALLOC_FAIL",
    207018: "ACL_ERROR_RT_DEVICE_OOM",
    500000: "ACL_ERROR_INTERNAL_ERROR",
    507046: "ACL_ERROR_RT_STREAM_SYNC_TIMEOUT",
    507899: "ACL_ERROR_RT_DRV_INTERNAL_ERROR",
    507910: "ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
    507911: "ACL_ERROR_HOST_MEMORY_NOT_REGISTERED",
}


class _Location(ctypes.Structure):
    _fields_ = [("id", c_uint32), ("type", c_int)]


class _PhysicalMemProp(ctypes.Structure):
    _fields_ = [
        ("handleType", c_int),
        ("allocationType", c_int),
        ("memAttr", c_int),
        ("location", _Location),
        ("reserve", c_uint64),
    ]


class _MemUsageInfo(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 32),
        ("curMemSize", c_uint64),
        ("memPeakSize", c_uint64),
        ("reserved", c_size_t * 8),
    ]


# Every function that is called, with its parameters. All but the optional ones must exist.
FUNCTIONS: dict[str, list[Any]] = {
    "aclInit": [c_char_p],
    "aclFinalize": [],
    "aclrtGetDeviceCount": [POINTER(c_uint32)],
    "aclrtSetDevice": [c_int32],
    "aclrtResetDevice": [c_int32],
    "aclrtGetMemInfo": [c_int, POINTER(c_size_t), POINTER(c_size_t)],
    "aclrtMemGetAllocationGranularity": [POINTER(_PhysicalMemProp), c_int, POINTER(c_size_t)],
    "aclrtReserveMemAddress": [POINTER(c_void_p), c_size_t, c_size_t, c_void_p, c_uint64],
    "aclrtReleaseMemAddress": [c_void_p],
    "aclrtMallocPhysical": [POINTER(c_void_p), c_size_t, POINTER(_PhysicalMemProp), c_uint64],
    "aclrtFreePhysical": [c_void_p],
    "aclrtMapMem": [c_void_p, c_size_t, c_size_t, c_void_p, c_uint64],
    "aclrtUnmapMem": [c_void_p],
    "aclrtMallocHost": [POINTER(c_void_p), c_size_t],
    "aclrtFreeHost": [c_void_p],
    "aclrtMemcpy": [c_void_p, c_size_t, c_void_p, c_size_t, c_int],
    "aclrtMemcpyAsync": [c_void_p, c_size_t, c_void_p, c_size_t, c_int, c_void_p],
    "aclrtCreateStream": [POINTER(c_void_p)],
    "aclrtDestroyStream": [c_void_p],
    "aclrtSynchronizeStream": [c_void_p],
}
OPTIONAL_FUNCTIONS: dict[str, list[Any]] = {
    "aclrtHostRegisterV2": [c_void_p, c_uint64, c_uint32],
    "aclrtHostUnregister": [c_void_p],
    "aclrtGetStreamAvailableNum": [POINTER(c_uint32)],
    "aclrtSynchronizeStreamWithTimeout": [c_void_p, c_int32],
    "aclrtGetMemUsageInfo": [c_int32, POINTER(_MemUsageInfo), c_size_t, POINTER(c_size_t)],
    "aclrtGetVersion": [POINTER(c_int32), POINTER(c_int32), POINTER(c_int32)],
}
# These return text.
_TEXTS = ("aclrtGetSocName", "aclGetRecentErrMsg")


class AclError(Exception):
    """A call returned ``code``."""

    def __init__(self, call: str, code: int, reason: str = "") -> None:
        super().__init__(call, code, reason)
        self.call, self.code, self.reason = call, code, reason

    def __str__(self) -> str:
        name = f" ({NAMES[self.code]})" if self.code in NAMES else ""
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.call} failed with {self.code}{name}{reason}"


class AclMissing(Exception):
    """AscendCL or one of its functions cannot be loaded; the text says which and why."""


class Acl:
    """This process's AscendCL, initialised.

    Raises:
        AclMissing: it is not installed, or lacks a function that sleep mode needs.
        AclError: it cannot be initialised.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libascendcl.so")
        except OSError as error:
            raise AclMissing(str(error)) from None
        for name, parameters in (FUNCTIONS | OPTIONAL_FUNCTIONS).items():
            if self.has(name):
                getattr(self._library, name).argtypes = parameters
            elif name in FUNCTIONS:
                raise AclMissing(f"libascendcl.so has no {name}")
        for name in _TEXTS:
            if self.has(name):
                getattr(self._library, name).restype = c_char_p
        self._set: list[int] = []  # one entry per aclrtSetDevice
        try:
            self.call("aclInit", None)
        except AclError as error:
            if error.code != _ALREADY_INITIALISED:
                raise

    def has(self, name: str) -> bool:
        return hasattr(self._library, name)

    def call(self, name: str, *arguments: Any) -> None:
        """
        Raises:
            AclError: the call returned a code other than 0.
        """
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            lines = self._text("aclGetRecentErrMsg").strip().splitlines()
            raise AclError(name, code, lines[0] if lines else "")

    def _text(self, name: str) -> str:
        return (
            (getattr(self._library, name)() or b"").decode(errors="replace")
            if self.has(name)
            else ""
        )

    def soc(self) -> str:
        return self._text("aclrtGetSocName")

    def version(self) -> str:
        """The version of AscendCL's interface (not of CANN), or ``""`` if it is unknown."""
        if not self.has("aclrtGetVersion"):
            return ""
        parts = [c_int32() for _ in range(3)]
        self.call("aclrtGetVersion", *map(byref, parts))
        return ".".join(str(part.value) for part in parts)

    def device_count(self) -> int:
        count = c_uint32()
        try:
            self.call("aclrtGetDeviceCount", byref(count))
        except AclError as error:
            if error.code != NO_DEVICE:
                raise
            return 0
        return count.value

    def set_device(self, device: int) -> None:
        """Every thread needs this call. ``reset_devices`` reverts them all."""
        self.call("aclrtSetDevice", device)
        self._set.append(device)

    def reset_devices(self) -> None:
        """Reset each device as often as it was set."""
        while self._set:
            self.call("aclrtResetDevice", self._set.pop())

    def free_and_total(self) -> tuple[int, int]:
        """Bytes of the current device. They are device-wide: other processes change them."""
        free, total = c_size_t(), c_size_t()
        for attribute in (_HBM, _DDR):  # chips without HBM have only DDR
            self.call("aclrtGetMemInfo", attribute, byref(free), byref(total))
            if total.value:
                break
        return free.value, total.value

    def component_bytes(self, device: int) -> dict[str, int] | None:
        """Device memory that this process holds, by component of CANN; None if unknown."""
        if not self.has("aclrtGetMemUsageInfo"):
            return None
        components, count = (_MemUsageInfo * 128)(), c_size_t()
        try:
            self.call("aclrtGetMemUsageInfo", device, components, len(components), byref(count))
        except AclError:
            return None
        return {
            component.name.decode(errors="replace"): component.curMemSize
            for component in components[: count.value]
        }

    def granularity(self, device: int) -> int:
        unit = c_size_t()
        prop = _property(device)
        call = "aclrtMemGetAllocationGranularity"
        self.call(call, byref(prop), _GRANULARITY_MINIMUM, byref(unit))
        return unit.value

    def copy(self, to: Any, source: Any, count: int, kind: int) -> None:
        """A synchronous copy."""
        self.call("aclrtMemcpy", to, count, source, count, kind)

    def copy_async(self, to: int, source: int, count: int, kind: int, stream: int | None) -> None:
        self.call("aclrtMemcpyAsync", to, count, source, count, kind, stream)

    def synchronize(self, stream: int | None) -> None:
        self.call("aclrtSynchronizeStream", stream)

    def streams_left(self) -> int | None:
        """Streams that the device has left; None if this CANN cannot tell."""
        if not self.has("aclrtGetStreamAvailableNum"):
            return None
        count = c_uint32()
        self.call("aclrtGetStreamAvailableNum", byref(count))
        return count.value

    def reservation(self, size: int) -> AbstractContextManager[int]:
        """The address of a range without memory."""
        return self._taken("aclrtReserveMemAddress", "aclrtReleaseMemAddress", size, 0, None, 0)

    def physical(self, device: int, size: int) -> AbstractContextManager[int]:
        """A handle of device memory."""
        prop = byref(_property(device))
        return self._taken("aclrtMallocPhysical", "aclrtFreePhysical", size, prop, 0)

    def page_locked(self, size: int) -> AbstractContextManager[int]:
        """The address of host memory."""
        return self._taken("aclrtMallocHost", "aclrtFreeHost", size)

    @contextmanager
    def _taken(self, take: str, give_back: str, *arguments: Any) -> Iterator[int]:
        """What ``take`` writes to its first argument."""
        taken = c_void_p()
        self.call(take, byref(taken), *arguments)
        try:
            yield taken.value or 0
        finally:
            self.call(give_back, taken)

    @contextmanager
    def mapped(self, address: int, size: int, handle: int) -> Iterator[int]:
        self.call("aclrtMapMem", address, size, 0, handle, 0)
        try:
            yield address
        finally:
            self.call("aclrtUnmapMem", address)

    @contextmanager
    def device_memory(self, device: int, size: int) -> Iterator[int]:
        """Allocate and map device memory in the same way as sleep mode."""
        with (
            self.reservation(size) as address,
            self.physical(device, size) as handle,
            self.mapped(address, size, handle),
        ):
            yield address

    @contextmanager
    def registered(self, address: int, size: int) -> Iterator[None]:
        self.call("aclrtHostRegisterV2", address, size, REGISTER_PINNED)
        try:
            yield
        finally:
            self.call("aclrtHostUnregister", address)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Enter it after the memory that it uses: at the end it is waited for first."""
        with self._taken("aclrtCreateStream", "aclrtDestroyStream") as handle:
            try:
                yield handle
            finally:
                self.synchronize(handle)


def _property(device: int) -> _PhysicalMemProp:
    return _PhysicalMemProp(0, 0, _HBM_HUGE, _Location(device, _ON_DEVICE), 0)


@contextmanager
def plain_memory(size: int) -> Iterator[int]:
    """Anonymous host memory, page-aligned, touched and not locked."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = (ctypes.c_char * size).from_buffer(memory)
    ctypes.memset(view, 0, size)
    try:
        yield ctypes.addressof(view)
    finally:
        del view
        memory.close()
