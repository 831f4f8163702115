# SPDX-License-Identifier: Apache-2.0
"""Tests control this process's simulator through this module: counters, calls, faults."""

import ctypes
from dataclasses import dataclass
from functools import cache


class _Counters(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "deviceBytes",
            "physicalHandles",
            "mappings",
            "reservations",
            "allocations",
            "pinnedBytes",
            "registeredBytes",
            "streams",
            "events",
        )
    ]


@dataclass(frozen=True)
class Counters:
    """What this process holds on all devices together."""

    device_bytes: int
    physical_handles: int
    mappings: int
    reservations: int
    allocations: int
    pinned_bytes: int
    registered_bytes: int
    streams: int
    events: int


class _Costs(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in ("launches", "onAiCpu", "hiddenCopyBytes", "waits")
    ]


@dataclass(frozen=True)
class Costs:
    """The costs of this process's operators since the counters were reset.

    `waits` counts all calls of `aclrtSynchronize*`.
    """

    launches: int
    on_ai_cpu: int
    hidden_copy_bytes: int
    waits: int


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libascendcl.so")
    library.npuSimFaultHits.restype = ctypes.c_uint64
    library.npuSimCallCount.restype = ctypes.c_uint64
    library.npuSimCallLog.restype = ctypes.c_size_t
    library.npuSimFindOperator.restype = ctypes.c_void_p
    library.npuSimCountLaunch.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library


def counters() -> Counters:
    """The current counters."""
    figures = _Counters()
    _library().npuSimGetCounters(ctypes.byref(figures))
    return Counters(*(getattr(figures, field[0]) for field in figures._fields_))


def costs() -> Costs:
    """The costs since the counters were reset."""
    figures = _Costs()
    _library().npuSimGetCosts(ctypes.byref(figures))
    return Costs(*(getattr(figures, field[0]) for field in figures._fields_))


def set_faults(rules: str) -> None:
    """Replace the fault rules, written as in ``NPU_SIM_FAULTS``; ``""`` removes them.

    Raises:
        ValueError: the rules are invalid.
    """
    if _library().npuSimSetFaults(rules.encode()) != 0:
        raise ValueError(f"faults {rules!r} are not call:nth:code[:times], comma separated")


def fault_hits() -> int:
    """The number of calls that the rules have hit since they were set."""
    return _library().npuSimFaultHits()


def call_count(name: str) -> int:
    """Calls of an AscendCL function, or an operator such as `aten::mm`, since the reset."""
    return _library().npuSimCallCount(name.encode())


def reset_counters() -> None:
    """Set all counts to zero."""
    _library().npuSimResetCounters()


def keep_call_log(on: bool) -> None:
    """Start an empty log of calls, or stop logging."""
    _library().npuSimKeepCallLog(int(on))


def call_log() -> list[str]:
    """The AscendCL calls since the log was started, by name and in order."""
    room = _library().npuSimCallLog(None, ctypes.c_size_t(0)) + 1
    text = ctypes.create_string_buffer(room)
    _library().npuSimCallLog(text, ctypes.c_size_t(room))
    return text.value.decode().split()
