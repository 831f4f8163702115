# SPDX-License-Identifier: Apache-2.0
"""Device memory from aclrtMalloc, pinned host memory, and what the device has in total."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from ctypes import byref, c_size_t, c_uint32, c_uint64, c_void_p

import pytest
from helpers.ascendcl import (
    ALREADY_REGISTERED,
    DDR_MEM,
    DEVICE_ID,
    DRIVER,
    GIB,
    HUGE,
    INVALID_PARAM,
    MEMORY_TYPE,
    MIB,
    NOT_REGISTERED,
    OUT_OF_MEMORY,
    REGISTER_MAPPED,
    REGISTER_PINNED,
    RT_PARAM,
    SUCCESS,
    UNSUPPORTED,
    bytes_at,
    call,
    free_and_total,
    library,
    malloc,
    malloc_host,
    mapped,
    message,
    ok,
    run_python,
)

from vllm_sleep_ascend.sim import control

PAGE = 4096


def test_total_and_free() -> None:
    assert free_and_total() == (GIB, GIB)
    assert free_and_total(DDR_MEM) == (0, 0)
    assert call("aclrtGetMemInfo", 99, byref(c_size_t()), byref(c_size_t())) == MEMORY_TYPE


def test_a_chip_without_hbm_has_ddr() -> None:
    code = "print(*free_and_total(DDR_MEM), *free_and_total(HBM_MEM))"
    result = run_python(code, NPU_SIM_SOC="310P", NPU_SIM_MACHINE=f"ddr-{os.getpid()}")
    assert result.stdout.split() == [str(GIB)] * 4, result.stderr


class Usage(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 32),
        ("current", c_uint64),
        ("peak", c_uint64),
        ("reserved", c_size_t * 8),
    ]


def test_what_components_of_cann_hold() -> None:
    memory, found, count = mapped(), (Usage * 2)(), c_size_t(9)
    ok("aclrtGetMemUsageInfo", 0, found, c_size_t(2), byref(count))
    assert [(usage.name, usage.current) for usage in found] == [(b"APP", HUGE), (b"HCCL", 0)]
    ok("aclrtGetMemUsageInfo", 0, found, c_size_t(1), byref(count))
    assert count.value == 1, "what takes most of it first"
    assert call("aclrtGetMemUsageInfo", 0, found, c_size_t(0), byref(count)) == RT_PARAM
    assert count.value == 0
    assert call("aclrtGetMemUsageInfo", 2, found, c_size_t(2), byref(count)) == DEVICE_ID
    memory.free()


@pytest.mark.parametrize(("size", "counted"), [(1, PAGE), (PAGE + 1, 2 * PAGE), (3 * MIB, 4 * MIB)])
def test_allocations_are_counted(size: int, counted: int) -> None:
    free, _ = free_and_total()
    code, pointer = malloc(size)
    assert code == SUCCESS
    assert free_and_total()[0] == free - counted == free - control.counters().device_bytes
    assert bytes_at(pointer, 2) == b"\xff\x7f"
    ok("aclrtFree", pointer)
    assert free_and_total()[0] == free


def test_malloc_refuses() -> None:
    assert malloc(0)[0] == RT_PARAM
    assert malloc(GIB + 1)[0] == OUT_OF_MEMORY
    assert "out of memory" in message()
    assert malloc((1 << 64) - 1)[0] == OUT_OF_MEMORY


def test_free_refuses() -> None:
    _, pointer = malloc(HUGE)
    assert call("aclrtFree", pointer + 4096) == RT_PARAM
    ok("aclrtFree", pointer)
    assert call("aclrtFree", pointer) == RT_PARAM
    assert call("aclrtReleaseMemAddress", pointer) == RT_PARAM


def test_an_allocation_is_no_reservation() -> None:
    _, pointer = malloc(HUGE)
    assert call("aclrtReleaseMemAddress", pointer) == RT_PARAM
    assert call("aclrtUnmapMem", pointer) == DRIVER
    ok("aclrtFree", pointer)


def test_a_reservation_is_no_allocation() -> None:
    memory = mapped()
    assert call("aclrtFree", memory.address) == RT_PARAM
    memory.free()


def test_freed_memory_faults() -> None:
    code = "_, pointer = malloc(HUGE); ok('aclrtFree', pointer); bytes_at(pointer, 1)"
    assert run_python(code).returncode == -11


def test_pinned_memory() -> None:
    pointer = malloc_host(MIB + 1)
    assert control.counters().pinned_bytes == MIB + PAGE
    assert bytes_at(pointer, MIB) == b"\xff\x7f" * (MIB // 2), "any content"
    ctypes.memset(pointer, 1, MIB + 1)
    assert call("aclrtFreeHost", pointer + PAGE) == RT_PARAM
    ok("aclrtFreeHost", pointer)
    assert call("aclrtFreeHost", pointer) == RT_PARAM


def test_pinned_memory_is_limited_in_one_call() -> None:
    pointer = c_void_p()
    assert call("aclrtMallocHost", byref(pointer), c_size_t(0)) == INVALID_PARAM
    assert call("aclrtMallocHost", byref(pointer), c_size_t(201 * GIB)) == OUT_OF_MEMORY


@pytest.fixture
def pages() -> Iterator[int]:
    memory = mmap.mmap(-1, 8 * PAGE)
    view = ctypes.c_char.from_buffer(memory)
    yield ctypes.addressof(view)
    del view
    memory.close()


def register(pointer: int, size: int, flag: int = REGISTER_PINNED) -> int:
    return call("aclrtHostRegisterV2", pointer, c_uint64(size), c_uint32(flag))


def test_register(pages: int) -> None:
    assert register(pages, 2 * PAGE) == SUCCESS
    assert control.counters().registered_bytes == 2 * PAGE
    assert register(pages, PAGE) == ALREADY_REGISTERED
    assert register(pages + PAGE, 2 * PAGE) == ALREADY_REGISTERED, "overlaps"
    assert register(pages + 2 * PAGE, PAGE) == SUCCESS, "a neighbour"
    ok("aclrtHostUnregister", pages)
    ok("aclrtHostUnregister", pages + 2 * PAGE)
    assert call("aclrtHostUnregister", pages) == NOT_REGISTERED


def device_pointer(pointer: int) -> tuple[int, int | None]:
    on_device = c_void_p()
    code = call("aclrtHostGetDevicePointer", pointer, byref(on_device), c_uint32(0))
    return code, on_device.value


def test_only_mapped_memory_has_a_device_pointer(pages: int) -> None:
    assert register(pages, PAGE) == SUCCESS
    assert device_pointer(pages) == (RT_PARAM, None), "pinned alone"
    assert register(pages + PAGE, 2 * PAGE, REGISTER_MAPPED | REGISTER_PINNED) == SUCCESS
    assert device_pointer(pages + PAGE) == (SUCCESS, pages + PAGE)
    assert device_pointer(pages + 2 * PAGE) == (RT_PARAM, None), "not its start"
    ok("aclrtHostUnregister", pages + PAGE)
    assert device_pointer(pages + PAGE) == (RT_PARAM, None)
    ok("aclrtHostUnregister", pages)


def test_unregister_needs_the_start(pages: int) -> None:
    assert register(pages, 2 * PAGE) == SUCCESS
    assert call("aclrtHostUnregister", pages + PAGE) == NOT_REGISTERED
    ok("aclrtHostUnregister", pages)


def test_register_refuses(pages: int) -> None:
    assert register(pages + 512, PAGE) == RT_PARAM, "not aligned"
    assert register(pages, 0) == INVALID_PARAM
    assert register(pages, PAGE, 0) == RT_PARAM
    assert register(pages, PAGE, 8) == RT_PARAM, "an unsupported flag"
    _, pointer = malloc(HUGE)
    assert register(pointer, PAGE) == RT_PARAM, "device memory"
    ok("aclrtFree", pointer)
    assert register(1 << 45, PAGE) == RT_PARAM, "no memory there"
    assert control.counters().registered_bytes == 0


def test_register_v1(pages: int) -> None:
    on_device = c_void_p()
    size = c_uint64(PAGE)
    assert call("aclrtHostRegister", pages, size, 4, byref(on_device)) == UNSUPPORTED
    ok("aclrtHostRegister", pages, size, 0, byref(on_device))
    assert on_device.value == pages
    ok("aclrtHostUnregister", pages)


def test_pinned_memory_can_be_mapped_and_not_be_pinned_again() -> None:
    pointer = malloc_host(2 * PAGE)
    assert register(pointer, PAGE) == ALREADY_REGISTERED
    assert register(pointer, PAGE, REGISTER_MAPPED | REGISTER_PINNED) == ALREADY_REGISTERED
    assert call("aclrtHostUnregister", pointer) == NOT_REGISTERED
    assert register(pointer, 2 * PAGE, REGISTER_MAPPED) == SUCCESS
    assert register(pointer, PAGE, REGISTER_MAPPED) == ALREADY_REGISTERED
    assert device_pointer(pointer) == (SUCCESS, pointer)
    ok("aclrtHostUnregister", pointer)
    ok("aclrtFreeHost", pointer)


def test_freeing_registered_memory_aborts() -> None:
    result = run_python(
        "pointer = malloc_host(4096)\n"
        "arguments = (c_uint64(4096), c_uint32(REGISTER_MAPPED))\n"
        "ok('aclrtHostRegisterV2', pointer, *arguments)\n"
        "call('aclrtFreeHost', pointer)"
    )
    assert result.returncode == -6
    assert "still registered" in result.stderr


def test_every_refusal_has_a_message_that_is_told_once() -> None:
    assert malloc(0)[0] == RT_PARAM
    assert message() == "aclrtMalloc: size is 0 [107000]"
    assert message() == ""
    assert library.aclrtGetLastError(0) == RT_PARAM
    assert library.aclrtGetLastError(0) == SUCCESS
