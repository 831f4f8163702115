# SPDX-License-Identifier: Apache-2.0
"""Virtual memory: allocating, mapping, unmapping and freeing."""

import time
from contextlib import ExitStack
from typing import Any

from vllm_sleep_ascend.doctor.finding import Finding, degraded, failed, passed
from vllm_sleep_ascend.doctor.probes.base import Device
from vllm_sleep_ascend.doctor.sizes import GIB, gib, mib


def at_an_offset(device: Device) -> Finding:
    acl, unit = device.acl, device.unit
    with (
        acl.reservation(4 * unit) as base,
        acl.physical(device.index, unit) as one,
        acl.physical(device.index, unit) as two,
        acl.mapped(base + unit, unit, one) as low,
        acl.mapped(base + 2 * unit, unit, two) as high,
    ):
        device.write(low, 1, unit)
        device.write(high, 2, unit)
        wrong = device.wrong(low, 1, unit) + device.wrong(high, 2, unit)
    if wrong:
        return _broken(wrong)
    return passed(
        f"two handles in one reservation hold their content, in units of {mib(unit)}",
        granularity_bytes=unit,
    )


def mapped_again(device: Device) -> Finding:
    acl, unit = device.acl, device.unit
    with acl.reservation(2 * unit) as base, acl.physical(device.index, unit) as handle:
        address = base + unit
        with acl.mapped(address, unit, handle):
            device.write(address, 1, unit)
        with acl.physical(device.index, unit) as another, acl.mapped(address, unit, another):
            device.write(address, 2, unit)
            wrong = device.wrong(address, 2, unit)
        with acl.mapped(address, unit, handle):
            wrong += device.wrong(address, 1, unit)
    if wrong:
        return _broken(wrong)
    return passed("content stays with its memory, and other memory works at the same address")


def comes_free(device: Device) -> Finding:
    acl, size = device.acl, device.size
    before, _ = acl.free_and_total()
    started = time.perf_counter()
    with ExitStack() as stack:
        base = stack.enter_context(acl.reservation(size))
        for offset in range(0, size, device.block):
            chunk = min(device.block, size - offset)
            handle = stack.enter_context(acl.physical(device.index, chunk))
            stack.enter_context(acl.mapped(base + offset, chunk, handle))
        taken_s = time.perf_counter() - started
        during, _ = acl.free_and_total()
        started = time.perf_counter()
    given_s = time.perf_counter() - started
    after, _ = acl.free_and_total()
    figures: dict[str, Any] = {
        "bytes": size,
        "taken_bytes": before - during,
        "freed_bytes": after - during,
        "take_ms_per_gib": round(taken_s * 1e3 * GIB / size, 2),
        "give_ms_per_gib": round(given_s * 1e3 * GIB / size, 2),
    }
    if after - during < 0.9 * size:
        return late(f"{gib(size)} were freed, {gib(after - during)} became free", **figures)
    return passed(
        f"{gib(size)} allocated in {taken_s * 1e3:.1f} ms, freed in {given_s * 1e3:.1f} ms",
        **figures,
    )


def late(found: str, **figures: Any) -> Finding:
    return degraded(
        found,
        "Other processes may not get the memory of a sleeping engine at once.",
        "Repeat it on a device that nobody else uses; if it persists, see the driver's log.",
        **figures,
    )


def _broken(wrong: int) -> Finding:
    return failed(
        f"{wrong} pages are wrong",
        "The driver loses the content of virtual memory, so weights would be lost.",
        "Do not use sleep mode here. Install a newer driver and CANN, and run this again.",
        wrong_pages=wrong,
    )
