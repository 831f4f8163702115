# SPDX-License-Identifier: Apache-2.0
"""Streams: their number, timeouts, and the speed of copies."""

import ctypes
import time
from contextlib import ExitStack
from typing import Any

from vllm_sleep_ascend.doctor.acl import (
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    SYNC_TIMEOUT,
    Acl,
    AclError,
)
from vllm_sleep_ascend.doctor.finding import Finding, degraded, passed
from vllm_sleep_ascend.doctor.probes.base import STREAMS, Device, a_stream, open_streams
from vllm_sleep_ascend.doctor.sizes import MIB

CHUNKS_MIB = (2, 16, 64)
STREAM_COUNTS = (1, 2, STREAMS)
_WHOLE_S = 8.0  # time limit of the table of speeds


def streams(device: Device) -> Finding:
    left = device.acl.streams_left()
    with ExitStack() as stack:
        made = len(open_streams(device.acl, stack, STREAMS))
    figures: dict[str, Any] = {"left": left, "made": made}
    said = "this CANN does not tell how many are left" if left is None else f"{left} left"
    if made == STREAMS:
        return passed(f"{said}; sleep mode keeps at most {STREAMS}", **figures)
    return degraded(
        f"{said}, {made} of the {STREAMS} that sleep mode keeps could be created",
        "Copies are slower: they share fewer streams, or are synchronous if none is left.",
        "End other processes on the device, or let them capture fewer graphs, which use streams.",
        **figures,
    )


def deadlines(device: Device) -> Finding:
    acl, size = device.acl, device.block
    if not acl.has("aclrtSynchronizeStreamWithTimeout"):
        return degraded(
            "this CANN has no aclrtSynchronizeStreamWithTimeout",
            "A copy that never completes blocks the engine until it is restarted.",
            "Install a newer CANN.",
            available=False,
        )
    with device.memory(size) as address, acl.page_locked(size) as host, a_stream(acl) as stream:
        acl.copy_async(address, host, size, HOST_TO_DEVICE, stream)
        try:
            acl.call("aclrtSynchronizeStreamWithTimeout", stream, 1)
            found = "a copy was waited for with a deadline"
        except AclError as error:
            if error.code != SYNC_TIMEOUT:
                raise
            found = "a deadline of 1 ms ended the wait for a copy, which then completed"
        acl.synchronize(stream)
    return passed(found, available=True)


def speeds(device: Device) -> Finding:
    acl, size = device.acl, min(256 * MIB, device.size)
    with ExitStack() as stack:
        address = stack.enter_context(device.memory(size))
        host = stack.enter_context(acl.page_locked(size))
        ctypes.memset(host, 1, size)
        device.acl.copy(address, host, size, HOST_TO_DEVICE)
        stack.callback(acl.synchronize, None)
        made = open_streams(acl, stack, STREAMS)
        rows = _table(acl, address, host, size, made or [None])
    best = {
        direction: max(
            (row for row in rows if row["direction"] == direction),
            key=lambda row: row["gb_per_s"],
        )
        for direction in ("to_device", "to_host")
    }
    found = "; ".join(
        f"{direction.replace('_', ' the ')} {row['gb_per_s']:.1f} GB/s "
        f"({row['chunk_mib']} MiB, {row['streams']} stream{'s' * (row['streams'] > 1)})"
        for direction, row in best.items()
    )
    return passed(f"best {found}", best=best, all=rows)


def _table(
    acl: Acl, address: int, host: int, size: int, streams: list[Any]
) -> list[dict[str, Any]]:
    """A row for each chunk size, number of streams and direction, as far as the time allows."""
    rows: list[dict[str, Any]] = []
    end = time.perf_counter() + _WHOLE_S
    counts = sorted({min(count, len(streams)) for count in STREAM_COUNTS})
    cases = [(chunk, count) for chunk in CHUNKS_MIB for count in counts if chunk * MIB <= size]
    directions = (
        ("to_device", address, host, HOST_TO_DEVICE),
        ("to_host", host, address, DEVICE_TO_HOST),
    )
    for chunk, count in cases:
        if rows and time.perf_counter() > end:
            break
        for direction, to, source, kind in directions:
            speed = _speed(acl, to, source, size, chunk * MIB, kind, streams[:count])
            row = {"direction": direction, "chunk_mib": chunk, "streams": count}
            rows.append({**row, "gb_per_s": round(speed, 2)})
    return rows


def _speed(
    acl: Acl, to: int, source: int, size: int, chunk: int, kind: int, streams: list[Any]
) -> float:
    def run() -> float:
        started = time.perf_counter()
        for turn, offset in enumerate(range(0, size - chunk + 1, chunk)):
            stream = streams[turn % len(streams)]
            acl.copy_async(to + offset, source + offset, chunk, kind, stream)
        for stream in streams:
            acl.synchronize(stream)
        return size // chunk * chunk / 1e9 / max(time.perf_counter() - started, 1e-9)

    return max(run(), run())
