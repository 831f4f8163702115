# SPDX-License-Identifier: Apache-2.0
"""Virtual memory management: what hardware refuses is refused, with the same code."""

import ctypes
import os
from ctypes import byref, c_size_t, c_uint64, c_void_p

import pytest
from helpers.ascendcl import (
    DEVICE_ID,
    DRIVER,
    GIB,
    HANDLE,
    HBM_HUGE,
    HBM_HUGE1G,
    HBM_NORMAL,
    HBM_P2P_HUGE1G,
    HOST_TO_DEVICE,
    HUGE,
    INVALID_PARAM,
    MIB,
    OUT_OF_MEMORY,
    RT_PARAM,
    SUCCESS,
    UNSUPPORTED,
    bytes_at,
    call,
    free_and_total,
    malloc_physical,
    map_mem,
    mapped,
    memcpy,
    message,
    ok,
    physical,
    prop,
    reserve,
    run_python,
)

from vllm_sleep_ascend.sim import control


def try_reserve(size: int, alignment: int = 0, expected: int | None = None, flags: int = 0) -> int:
    address = c_void_p()
    return call(
        "aclrtReserveMemAddress",
        byref(address),
        c_size_t(size),
        c_size_t(alignment),
        expected,
        c_uint64(flags),
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((0,), INVALID_PARAM),
        ((128 * GIB + 1,), RT_PARAM),
        ((HUGE, 4096), RT_PARAM),
        ((HUGE, 0, 1 << 40), RT_PARAM),
        ((HUGE, 0, None, 2), INVALID_PARAM),
    ],
)
def test_reserve_refuses(arguments: tuple[int, ...], code: int) -> None:
    assert try_reserve(*arguments) == code
    assert "aclrtReserveMemAddress" in message()


def test_a_reservation_of_128_gib_takes_no_memory() -> None:
    free, _ = free_and_total()
    address = reserve(128 * GIB)
    assert free_and_total()[0] == free
    ok("aclrtReleaseMemAddress", address)


def test_a_process_has_8_tib_of_addresses() -> None:
    result = run_python(
        "reserved = [reserve(128 * GIB) for _ in range(64)]\n"
        "address = byref(c_void_p())\n"
        "more = address, c_size_t(HUGE), c_size_t(0), None, c_uint64(0)\n"
        "print(call('aclrtReserveMemAddress', *more))\n"
        "ok('aclrtReleaseMemAddress', reserved.pop())\n"
        "print(call('aclrtReserveMemAddress', *more))\n"
    )
    assert result.stdout == f"{OUT_OF_MEMORY}\n{SUCCESS}\n", result.stderr


def test_release_needs_everything_unmapped() -> None:
    memory = mapped()
    assert call("aclrtReleaseMemAddress", memory.address) == DRIVER
    memory.free()
    assert call("aclrtReleaseMemAddress", memory.address) == RT_PARAM


def test_release_needs_the_start() -> None:
    address = reserve(2 * HUGE)
    assert call("aclrtReleaseMemAddress", address + HUGE) == RT_PARAM
    ok("aclrtReleaseMemAddress", address)


@pytest.mark.parametrize(
    ("attribute", "granularity"), [(HBM_HUGE, HUGE), (HBM_NORMAL, HUGE), (HBM_HUGE1G, GIB)]
)
def test_granularity(attribute: int, granularity: int) -> None:
    result = c_size_t()
    property = prop(attribute)
    ok("aclrtMemGetAllocationGranularity", byref(property), 0, byref(result))
    assert result.value == granularity
    assert malloc_physical(granularity // 2, property)[0] == RT_PARAM


def test_granularity_of_an_unsupported_attribute() -> None:
    result = c_size_t()
    for attribute in (0, 1, 2, 99):
        property = prop(attribute)
        name = "aclrtMemGetAllocationGranularity"
        assert call(name, byref(property), 0, byref(result)) == INVALID_PARAM
        assert malloc_physical(HUGE, property)[0] == INVALID_PARAM


@pytest.mark.parametrize("size", [4096, HUGE + 4096])
def test_physical_memory_is_granular(size: int) -> None:
    assert malloc_physical(size)[0] == RT_PARAM


@pytest.mark.parametrize(
    ("chip", "attribute", "code"),
    [
        ("910B", HBM_HUGE1G, SUCCESS),
        ("910B", HBM_P2P_HUGE1G, UNSUPPORTED),
        ("910_93", HBM_P2P_HUGE1G, SUCCESS),
        ("310P", HBM_HUGE1G, UNSUPPORTED),
        ("310P", HBM_HUGE, SUCCESS),
    ],
)
def test_which_chips_have_pages_of_1_gib(chip: str, attribute: int, code: int) -> None:
    result = run_python(
        f"print(malloc_physical(GIB, prop({attribute}))[0])",
        NPU_SIM_SOC=chip,
        NPU_SIM_MACHINE=f"pages-{os.getpid()}",
    )
    assert result.stdout == f"{code}\n", result.stderr


def test_physical_memory_of_what_is_not_a_device() -> None:
    assert malloc_physical(HUGE, prop(device=7))[0] == DEVICE_ID
    assert malloc_physical(HUGE, prop(location=0))[0] == INVALID_PARAM


def test_physical_memory_runs_out() -> None:
    free, total = free_and_total()
    handle = physical(free - HUGE)
    assert malloc_physical(2 * HUGE)[0] == OUT_OF_MEMORY
    assert str(2 * HUGE) in message()
    ok("aclrtFreePhysical", handle)
    assert free_and_total() == (free, total)


def test_unknown_and_freed_handles() -> None:
    handle = physical(HUGE)
    ok("aclrtFreePhysical", handle)
    assert call("aclrtFreePhysical", handle) == HANDLE
    address = reserve(HUGE)
    assert map_mem(address, HUGE, handle) == HANDLE
    assert map_mem(address, HUGE, 1 << 40) == HANDLE
    ok("aclrtReleaseMemAddress", address)


def test_map_refuses() -> None:
    address = reserve(4 * HUGE)
    handle = physical(2 * HUGE)
    other = physical(2 * HUGE)
    assert map_mem(address, HUGE, handle) == RT_PARAM, "size is not the handle's"
    assert map_mem(address + 4096, 2 * HUGE, handle) == RT_PARAM, "not aligned"
    assert map_mem(address + 3 * HUGE, 2 * HUGE, handle) == RT_PARAM, "beyond the reservation"
    assert map_mem(address - HUGE, 2 * HUGE, handle) == RT_PARAM, "before the reservation"
    assert map_mem(address + HUGE, 2 * HUGE, handle) == SUCCESS
    assert map_mem(address, 2 * HUGE, other) == RT_PARAM, "overlaps from below"
    assert map_mem(address + 2 * HUGE, 2 * HUGE, other) == RT_PARAM, "overlaps from above"
    assert control.counters().mappings == 1
    ok("aclrtUnmapMem", address + HUGE)
    for each in (handle, other):
        ok("aclrtFreePhysical", each)
    ok("aclrtReleaseMemAddress", address)


def test_one_reservation_holds_many_handles() -> None:
    address = reserve(3 * HUGE)
    handles = [physical(HUGE) for _ in range(3)]
    for i, handle in enumerate(handles):
        assert map_mem(address + i * HUGE, HUGE, handle) == SUCCESS
    source = ctypes.create_string_buffer(b"x" * (3 * HUGE), 3 * HUGE)
    to, size = address, 3 * HUGE
    assert memcpy(to, ctypes.addressof(source), size, HOST_TO_DEVICE) == SUCCESS
    assert bytes_at(address, 3 * HUGE) == source.raw
    for i, handle in enumerate(handles):
        ok("aclrtUnmapMem", address + i * HUGE)
        ok("aclrtFreePhysical", handle)
    ok("aclrtReleaseMemAddress", address)


def test_a_reservation_belongs_to_one_device() -> None:
    address, ours = reserve(2 * HUGE), physical(HUGE)
    code, theirs = malloc_physical(HUGE, prop(device=1))
    assert code == SUCCESS
    assert map_mem(address, HUGE, ours) == SUCCESS
    assert map_mem(address + HUGE, HUGE, theirs) == RT_PARAM
    assert "another device" in message()
    ok("aclrtUnmapMem", address)
    assert map_mem(address, HUGE, theirs) == RT_PARAM, "even with nothing mapped"
    ok("aclrtReleaseMemAddress", address)
    address = reserve(HUGE)
    assert map_mem(address, HUGE, theirs) == SUCCESS
    ok("aclrtUnmapMem", address)
    for handle in (ours, theirs):
        ok("aclrtFreePhysical", handle)
    ok("aclrtReleaseMemAddress", address)


def test_a_handle_is_mapped_once() -> None:
    memory = mapped()
    elsewhere = reserve(HUGE)
    assert map_mem(elsewhere, HUGE, memory.handle) == RT_PARAM
    assert "already mapped" in message()
    ok("aclrtReleaseMemAddress", elsewhere)
    memory.free()


def test_unmap_needs_the_start_of_a_mapping() -> None:
    memory = mapped(2 * HUGE)
    assert call("aclrtUnmapMem", memory.address + HUGE) == DRIVER
    ok("aclrtUnmapMem", memory.address)
    assert call("aclrtUnmapMem", memory.address) == DRIVER
    ok("aclrtFreePhysical", memory.handle)
    ok("aclrtReleaseMemAddress", memory.address)


def test_freeing_a_mapped_handle_takes_effect_at_unmap() -> None:
    free, _ = free_and_total()
    memory = mapped()
    ok("aclrtFreePhysical", memory.handle)
    assert free_and_total()[0] == free - HUGE
    ctypes.memset(memory.address, 7, HUGE)
    assert call("aclrtFreePhysical", memory.handle) == HANDLE
    ok("aclrtUnmapMem", memory.address)
    assert free_and_total()[0] == free
    ok("aclrtReleaseMemAddress", memory.address)


def test_new_memory_is_poison() -> None:
    memory = mapped(4 * HUGE)
    assert bytes_at(memory.address, memory.size) == b"\xff\x7f" * (2 * HUGE)
    ctypes.memset(memory.address, 0, memory.size)
    memory.free()
    memory = mapped(4 * HUGE)
    assert bytes_at(memory.address, memory.size) == b"\xff\x7f" * (2 * HUGE)
    memory.free()


def test_content_follows_the_handle() -> None:
    size = 6 * MIB
    memory = mapped(size)
    pattern = bytes(range(256)) * (size // 512)
    ctypes.memmove(memory.address, pattern, len(pattern))
    ok("aclrtUnmapMem", memory.address)
    elsewhere = reserve(4 * size)
    assert map_mem(elsewhere + size, size, memory.handle) == SUCCESS
    assert bytes_at(elsewhere + size, len(pattern)) == pattern
    assert bytes_at(elsewhere + size + len(pattern), 2) == b"\xff\x7f"
    ok("aclrtUnmapMem", elsewhere + size)
    ok("aclrtFreePhysical", memory.handle)
    ok("aclrtReleaseMemAddress", elsewhere)
    ok("aclrtReleaseMemAddress", memory.address)


@pytest.mark.parametrize(
    "code",
    [
        "memory = mapped(); ok('aclrtUnmapMem', memory.address); bytes_at(memory.address, 1)",
        "bytes_at(reserve(HUGE), 1)",
        "ctypes.memset(reserve(HUGE), 0, 1)",
    ],
)
def test_unmapped_memory_faults(code: str) -> None:
    assert run_python(code).returncode == -11


def test_access_is_set_on_mapped_memory_only() -> None:
    class Access(ctypes.Structure):
        _fields_ = [
            ("flags", ctypes.c_int),
            ("id", ctypes.c_uint32),
            ("type", ctypes.c_int),
            ("reserved", ctypes.c_uint8 * 12),
        ]

    memory = mapped()
    access = Access(3, 0, 1)
    size, count = c_size_t(HUGE), c_size_t(1)
    ok("aclrtMemSetAccess", memory.address, size, byref(access), count)
    assert call("aclrtMemSetAccess", memory.address, c_size_t(2 * HUGE), byref(access), count)
    access.type = 0
    assert call("aclrtMemSetAccess", memory.address, size, byref(access), count) == RT_PARAM
    memory.free()


def test_sharing_with_another_process() -> None:
    memory = mapped()
    ctypes.memset(memory.address, 5, HUGE)
    shareable = c_uint64()
    arguments = (memory.handle, 0, c_uint64(0), byref(shareable))
    ok("aclrtMemExportToShareableHandle", *arguments)
    assert bytes_at(memory.address, HUGE) == b"\5" * HUGE, "exporting keeps content"
    other = run_python(
        f"handle = c_void_p()\n"
        f"name = 'aclrtMemImportFromShareableHandle'\n"
        f"ok(name, c_uint64({shareable.value}), 0, byref(handle))\n"
        f"address = reserve(HUGE)\n"
        f"assert map_mem(address, HUGE, handle.value) == SUCCESS\n"
        f"assert bytes_at(address, HUGE) == b'\\5' * HUGE\n"
        f"ctypes.memset(address, 6, HUGE)\n"
        f"ours, both = physical(HUGE), reserve(2 * HUGE)\n"
        f"assert map_mem(both, HUGE, ours) == SUCCESS\n"
        f"ok('aclrtUnmapMem', address)\n"
        f"assert map_mem(both + HUGE, HUGE, handle.value) == RT_PARAM, 'imported beside own'\n"
        f"ok('aclrtUnmapMem', both)\n"
        f"assert map_mem(both + HUGE, HUGE, handle.value) == SUCCESS\n"
        f"assert map_mem(both, HUGE, ours) == RT_PARAM, 'own beside imported'\n"
    )
    assert other.returncode == 0, other.stderr
    assert bytes_at(memory.address, HUGE) == b"\6" * HUGE
    memory.free()
