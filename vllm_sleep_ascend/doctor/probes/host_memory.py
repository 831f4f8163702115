# SPDX-License-Identifier: Apache-2.0
"""Host memory for backups: plain, page-locked by aclrtMallocHost, registered."""

import ctypes
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from vllm_sleep_ascend.doctor.acl import (
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    NOT_SUPPORTED,
    AclError,
    plain_memory,
)
from vllm_sleep_ascend.doctor.content import content, wrong_pages
from vllm_sleep_ascend.doctor.finding import Finding, degraded, passed
from vllm_sleep_ascend.doctor.probes.base import Device, a_stream, broken_copies, copies_of
from vllm_sleep_ascend.doctor.sizes import GIB, MIB, mib
from vllm_sleep_ascend.memory.host import KERNEL_THAT_KEEPS_PAGES, why_registered_pages_move

USES_ACL = (
    'Backups use memory from aclrtMallocHost (host_memory="acl"), which works on every kernel and '
    "is slower to allocate."
)


def plain_copies(device: Device) -> Finding:
    acl, size = device.acl, device.block
    with device.memory(size) as address, plain_memory(size) as host:
        ctypes.memmove(host, content(1), size)
        acl.copy(address, host, size, HOST_TO_DEVICE)
        wrong = device.wrong(address, 1, size)
        device.write(address, 2, size)
        acl.copy(host, address, size, DEVICE_TO_HOST)
        wrong += wrong_pages(host, content(2), size)
    if wrong:
        return broken_copies(f"{wrong} pages arrived wrong", wrong_pages=wrong)
    return passed(f"synchronous copies of {mib(size)} are exact in both directions", bytes=size)


def page_locked(device: Device) -> Finding:
    acl, size = device.acl, device.block
    with (
        device.memory(size) as address,
        acl.page_locked(size) as host,
        a_stream(acl) as stream,
    ):
        copies = copies_of(device, address, host, size, stream)
    figures = {"bytes": size, **copies.figures()}
    if copies.wrong:
        return broken_copies(f"{copies.wrong} pages arrived wrong", **figures)
    if not copies.asynchronous:
        return degraded(
            f"{mib(size)} from aclrtMallocHost: copies are exact, but not asynchronous",
            "Sleep and wake work, but copies do not overlap with other work.",
            "Check for settings that make launches blocking (ASCEND_LAUNCH_BLOCKING), and for a "
            "newer driver.",
            **figures,
        )
    return passed(
        f"{mib(size)} from aclrtMallocHost: copies are asynchronous, and exact in both directions",
        **figures,
    )


def registered(device: Device) -> Finding:
    acl, size = device.acl, device.block
    release = os.uname().release

    def not_used(found: str, remedy: str) -> Finding:
        return degraded(found, USES_ACL, remedy, kernel=release, used=False)

    if not acl.has("aclrtHostRegisterV2"):
        remedy = "Nothing has to be done. CANN has it from 8.5 on, and not for Ascend 310P."
        return not_used("this CANN has no aclrtHostRegisterV2", remedy)
    older = None
    if reason := why_registered_pages_move():
        wanted = ".".join(map(str, KERNEL_THAT_KEEPS_PAGES))
        remedy = f"Nothing has to be done. A host with kernel {wanted} or newer can have it."
        older = not_used(f"not used: {reason}", remedy)
    try:
        with plain_memory(size) as host, _locked(host, size), acl.registered(host, size):
            if older:  # the chip has it: nothing more may be done with it on this kernel
                return older
            with device.memory(size) as address, a_stream(acl) as stream:
                copies = copies_of(device, address, host, size, stream)
    except OSError as error:
        remedy = "Raise ulimit -l; in a container, --ulimit memlock=-1."
        return older or not_used(str(error), remedy)
    except AclError as error:
        if error.code in NOT_SUPPORTED:
            remedy = "Nothing has to be done. No kernel brings it; Ascend 310P, for one, lacks it."
            return not_used(f"this chip has none: {error}", remedy)
        if older:
            return older
        raise
    used = copies.wrong == 0 and copies.asynchronous
    figures = {"kernel": release, "bytes": size, "used": used, **copies.figures()}
    if not used:
        found = f"{copies.wrong} pages arrived wrong" if copies.wrong else "not asynchronous"
        return degraded(found, USES_ACL, "Nothing has to be done.", **figures)
    return passed(f"copies are asynchronous and exact on kernel {release}", **figures)


def page_locking(device: Device) -> Finding:
    blocks = max(1, min(device.size, 256 * MIB) // device.block)
    take_1, give = _take_blocks(device, blocks, threads=1)
    take_4, _ = _take_blocks(device, blocks, threads=4)
    seconds = 14 * GIB / 1e9 / max(take_1, take_4)
    return passed(
        f"{take_1:.1f} GB/s with 1 thread, {take_4:.1f} with 4 ({seconds:.1f} s for 14 GiB); "
        f"freed at {give:.1f} GB/s",
        take_gb_per_s={"1": round(take_1, 2), "4": round(take_4, 2)},
        give_gb_per_s=round(give, 2),
    )


def _take_blocks(device: Device, blocks: int, threads: int) -> tuple[float, float]:
    """GB/s of allocating blocks with aclrtMallocHost on several threads, and of freeing them."""
    acl = device.acl

    def take() -> None:
        acl.set_device(device.index)
        taken.enter_context(acl.page_locked(device.block))

    with ExitStack() as taken:
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            works = [pool.submit(take) for _ in range(blocks)]
        for work in works:
            work.result()
        taken_s = time.perf_counter() - started
        started = time.perf_counter()
    given_s = time.perf_counter() - started
    gb = blocks * device.block / 1e9
    return gb / max(taken_s, 1e-9), gb / max(given_s, 1e-9)


@contextmanager
def _locked(address: int, size: int) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) != 0:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "no limit" if soft == resource.RLIM_INFINITY else f"the limit is {soft} bytes"
        reason = os.strerror(ctypes.get_errno())
        raise OSError(f"mlock of {mib(size)} failed: {reason} ({limit})")
    try:
        yield
    finally:
        libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(size))
