# SPDX-License-Identifier: Apache-2.0
"""Shared by the probes: the device, and verified copies."""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_sleep_ascend.doctor.acl import (
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    NO_RESOURCE,
    Acl,
    AclError,
)
from vllm_sleep_ascend.doctor.content import LIMIT, content, scratch, wrong_pages
from vllm_sleep_ascend.doctor.finding import Finding, failed

CHUNK = LIMIT  # the default of chunk_mib
STREAMS = 6  # the most that sleep mode keeps
SYNCHRONOUS = 0.5  # a copy counts as synchronous if its launch takes this part of its time
_TRIES, _LAUNCHES = 10, 4


@dataclass(frozen=True)
class Device:
    """The current device. Probes may use ``size`` bytes, a multiple of ``unit``."""

    acl: Acl
    index: int
    unit: int
    size: int

    @property
    def block(self) -> int:
        """The size of sleep mode's copies, or ``size`` if that is smaller."""
        return min(CHUNK, self.size)

    def memory(self, size: int) -> AbstractContextManager[int]:
        return self.acl.device_memory(self.index, size)

    def write(self, address: int, number: int, size: int) -> None:
        """Write the content of this number with a synchronous copy."""
        self.acl.copy(address, content(number), size, HOST_TO_DEVICE)

    def wrong(self, address: int, number: int, size: int) -> int:
        """The number of pages there that differ from the content of this number."""
        self.acl.copy(scratch(), address, size, DEVICE_TO_HOST)
        return wrong_pages(scratch(), content(number), size)


@dataclass(frozen=True)
class Probe:
    """A probe is skipped unless those in ``needs`` have passed. An ``extra`` one is at worst
    ``degraded``: sleep mode works without what it checks."""

    name: str
    title: str
    run: Callable[[Device], Finding]
    deadline_s: float = 10
    needs: tuple[str, ...] = ()
    extra: bool = False


class Copies(NamedTuple):
    """The number of wrong pages, and the part of the time that the launches took."""

    wrong_to_device: int
    wrong_to_host: int
    launch_share: float

    @property
    def wrong(self) -> int:
        return self.wrong_to_device + self.wrong_to_host

    @property
    def asynchronous(self) -> bool:
        return self.launch_share < SYNCHRONOUS

    def figures(self) -> dict[str, Any]:
        return {
            "exact_to_device": self.wrong_to_device == 0,
            "exact_to_host": self.wrong_to_host == 0,
            "asynchronous": self.asynchronous,
            "launch_share": round(self.launch_share, 4),
        }


def copies_of(device: Device, address: int, host: int, size: int, stream: int | None) -> Copies:
    """Asynchronous copies from and to host memory, compared byte by byte."""
    ctypes.memmove(host, content(1), size)
    share = launch_share(device, address, host, size, HOST_TO_DEVICE, stream)
    wrong_to_device = device.wrong(address, 1, size)
    device.write(address, 2, size)
    ctypes.memset(host, 0, size)
    share = max(share, launch_share(device, host, address, size, DEVICE_TO_HOST, stream))
    return Copies(wrong_to_device, wrong_pages(host, content(2), size), share)


def launch_share(
    device: Device, to: int, source: int, size: int, kind: int, stream: int | None
) -> float:
    """Copy several times, and return the part of the time that the launches took.

    Repeated while the copies look synchronous, because a busy machine may delay the caller.
    """
    least = 1.0
    for _ in range(_TRIES):
        started = time.perf_counter()
        for _ in range(_LAUNCHES):
            device.acl.copy_async(to, source, size, kind, stream)
        launched = time.perf_counter() - started
        device.acl.synchronize(stream)
        least = min(least, launched / max(time.perf_counter() - started, 1e-9))
        if least < SYNCHRONOUS:
            break
    return least


@contextmanager
def a_stream(acl: Acl) -> Iterator[int | None]:
    """A stream, or the context's default stream if the device has none left."""
    with ExitStack() as stack:
        made = open_streams(acl, stack, 1)
        if not made:
            stack.callback(acl.synchronize, None)
        yield made[0] if made else None


def open_streams(acl: Acl, stack: ExitStack, count: int) -> list[int]:
    """Open ``count`` streams, or as many as the device has left."""
    streams: list[int] = []
    try:
        while len(streams) < count:
            streams.append(stack.enter_context(acl.stream()))
    except AclError as error:
        if error.code != NO_RESOURCE:
            raise
    return streams


def broken_copies(found: str, **figures: Any) -> Finding:
    return failed(
        found,
        "Weights would come back damaged.",
        "Do not use sleep mode here. See dmesg and the device's log for faults of memory or link.",
        **figures,
    )
