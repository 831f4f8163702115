# SPDX-License-Identifier: Apache-2.0
"""End to end: memory sleeps and wakes with the allocator that engines use."""

import ctypes
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from vllm_sleep_ascend.doctor.acl import DEVICE_TO_HOST, HOST_TO_DEVICE
from vllm_sleep_ascend.doctor.finding import Finding, degraded, failed, passed
from vllm_sleep_ascend.doctor.probes.base import CHUNK, Device, broken_copies
from vllm_sleep_ascend.doctor.probes.device_memory import late
from vllm_sleep_ascend.doctor.sizes import gib

_READY_S = 10.0


def sleep_and_wake(device: Device) -> Finding:
    try:
        from vllm_sleep_ascend import _camem as camem
    except ImportError as error:
        return _by_hand(device, str(error))
    hooks = ctypes.CDLL(camem.__file__)
    hooks.camem_malloc.restype = ctypes.c_void_p
    hooks.camem_malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    hooks.camem_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    camem.set_current_tag("weights")
    address = hooks.camem_malloc(device.size, device.index, None)
    if address is None:
        return failed(
            f"the allocator could not allocate {gib(device.size)}",
            "No weights could be loaded.",
            "Free device memory, or choose a smaller --gib.",
        )
    try:
        return _twice(device, address, camem)
    finally:
        hooks.camem_free(address, device.size, device.index, None)
        camem.trim(set())  # completes a deferred free


def _twice(device: Device, address: int, camem: ModuleType) -> Finding:
    """Sleep and wake twice. The second sleep reuses the first one's host memory, after it has been
    page-locked."""
    size = device.size
    figures: dict[str, Any] = {"bytes": size, "by": "the compiled allocator"}
    _write(device, address, size)
    wrong = 0
    for cycle in ("first", "second"):
        camem.wait_prepared(_READY_S)
        before, _ = device.acl.free_and_total()
        slept = camem.sleep({"weights": "offload"})
        asleep, _ = device.acl.free_and_total()
        figures[f"{cycle}_page_locked_bytes"] = sum(
            allocation["page_locked_bytes"] for allocation in camem.allocations()
        )
        woke = camem.wake(["weights"])
        wrong += _wrong(device, address, size)
        figures[f"{cycle}_sleep_gb_per_s"] = _speed(size, slept)
        figures[f"{cycle}_wake_gb_per_s"] = _speed(size, woke)
        figures[f"{cycle}_freed_bytes"] = asleep - before
    figures |= {"exact": wrong == 0, "wrong_pages": wrong}
    if wrong:
        return broken_copies(f"{wrong} pages came back wrong after {gib(size)} slept", **figures)
    if figures["second_freed_bytes"] < 0.9 * size:
        freed = gib(figures["second_freed_bytes"])
        return late(f"{gib(size)} slept and came back exact; {freed} became free", **figures)
    plain = size - figures["second_page_locked_bytes"]
    return passed(
        f"{gib(size)} twice, exact; sleep {figures['first_sleep_gb_per_s']}, then "
        f"{figures['second_sleep_gb_per_s']} GB/s; wake {figures['second_wake_gb_per_s']} GB/s"
        + (f"; {gib(plain)} of the backup not page-locked yet" if plain else ""),
        **figures,
    )


def _by_hand(device: Device, why: str) -> Finding:
    """The allocator's calls, without the allocator."""
    acl, size = device.acl, device.size
    with acl.reservation(size) as address, acl.page_locked(size) as host:
        with acl.physical(device.index, size) as handle, acl.mapped(address, size, handle):
            _write(device, address, size)
            before, _ = acl.free_and_total()
            acl.copy(host, address, size, DEVICE_TO_HOST)
        asleep, _ = acl.free_and_total()
        with acl.physical(device.index, size) as handle, acl.mapped(address, size, handle):
            acl.copy(address, host, size, HOST_TO_DEVICE)
            wrong = _wrong(device, address, size)
    figures = {"bytes": size, "by": "the same calls", "exact": wrong == 0, "wrong_pages": wrong}
    figures["first_freed_bytes"] = asleep - before
    if wrong:
        return broken_copies(f"{wrong} pages came back wrong after {gib(size)} slept", **figures)
    return degraded(
        f"{gib(size)}, exact, with the allocator's calls, but without the compiled allocator",
        "The device supports sleep mode, but engines need the allocator.",
        f"Install the package with COMPILE_CUSTOM_KERNELS=1 (COMPILE.md). The import said: {why}",
        **figures,
    )


def _speed(size: int, report: dict[str, Any]) -> float:
    return round(size / 1e9 / max(report["seconds"], 1e-9), 2)


def _parts(size: int) -> Iterator[tuple[int, int, int]]:
    """Number, offset and size of each piece with its own content."""
    for number, offset in enumerate(range(0, size, CHUNK)):
        yield number % 500, offset, min(CHUNK, size - offset)


def _write(device: Device, address: int, size: int) -> None:
    for number, offset, part in _parts(size):
        device.write(address + offset, number, part)


def _wrong(device: Device, address: int, size: int) -> int:
    return sum(
        device.wrong(address + offset, number, part) for number, offset, part in _parts(size)
    )
