# SPDX-License-Identifier: Apache-2.0
"""Copies and fills."""

import ctypes
import time
from collections.abc import Iterator
from ctypes import byref, c_int32, c_size_t

import pytest
from helpers.ascendcl import (
    DEFAULT,
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    DRIVER,
    HOST_TO_DEVICE,
    HOST_TO_HOST,
    HUGE,
    INVALID_PARAM,
    MIB,
    RT_PARAM,
    SUCCESS,
    UNSUPPORTED,
    HostFunction,
    bytes_at,
    call,
    held,
    malloc,
    malloc_host,
    memcpy,
    memcpy_async,
    ok,
    reserve,
    run_python,
    stream,
    stream_is_idle,
)

from vllm_sleep_ascend.sim import control


@pytest.fixture
def on_device() -> Iterator[int]:
    code, pointer = malloc(HUGE)
    assert code == SUCCESS
    yield pointer
    ok("aclrtFree", pointer)


@pytest.fixture
def pinned() -> Iterator[int]:
    pointer = malloc_host(HUGE)
    yield pointer
    ok("aclrtFreeHost", pointer)


@pytest.fixture
def pageable() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(b"abcd" * (HUGE // 4), HUGE)


@pytest.mark.parametrize("kinds", [(HOST_TO_DEVICE, DEVICE_TO_HOST), (DEFAULT, DEFAULT)])
def test_there_and_back(on_device: int, pinned: int, kinds: tuple[int, int]) -> None:
    ctypes.memset(pinned, 3, HUGE)
    assert memcpy(on_device, pinned, HUGE, kinds[0]) == SUCCESS
    ctypes.memset(pinned, 0, HUGE)
    assert memcpy(pinned, on_device, HUGE, kinds[1]) == SUCCESS
    assert bytes_at(pinned, HUGE) == b"\3" * HUGE


def test_a_copy_refuses(on_device: int, pinned: int) -> None:
    assert memcpy(on_device, pinned, 100, HOST_TO_DEVICE, room=99) == RT_PARAM
    assert memcpy(on_device, pinned, 0, HOST_TO_DEVICE) == RT_PARAM
    assert memcpy(on_device, pinned, 100, 77) == INVALID_PARAM
    assert memcpy(pinned, pinned, 100, HOST_TO_HOST) == UNSUPPORTED
    assert memcpy(pinned, pinned, 100, DEFAULT) == UNSUPPORTED
    assert memcpy(on_device, pinned, 100, DEVICE_TO_HOST) == RT_PARAM, "the wrong way round"
    assert call("aclrtMemcpy", None, c_size_t(1), pinned, c_size_t(1), 1) == INVALID_PARAM
    assert bytes_at(on_device, 2) == b"\xff\x7f", "a refused copy copies nothing"


def test_a_copy_needs_mapped_memory(on_device: int, pinned: int) -> None:
    reserved = reserve(HUGE)
    assert memcpy(reserved, pinned, 100, HOST_TO_DEVICE) == RT_PARAM
    assert memcpy(pinned, reserved, 100, DEVICE_TO_HOST) == RT_PARAM
    end = on_device + HUGE - 50
    assert memcpy(end, pinned, 50, HOST_TO_DEVICE) == SUCCESS
    assert memcpy(end, pinned, 100, HOST_TO_DEVICE) == RT_PARAM, "beyond its end"
    assert memcpy(pinned, pinned + MIB, 100, HOST_TO_DEVICE) == RT_PARAM, "host memory"
    ok("aclrtReleaseMemAddress", reserved)


def test_an_asynchronous_copy_refuses(on_device: int, pinned: int) -> None:
    queue = stream()
    assert memcpy_async(on_device, pinned, 100, HOST_TO_DEVICE, queue, room=99) == RT_PARAM
    assert memcpy_async(pinned, pinned, 100, HOST_TO_HOST, queue) == UNSUPPORTED
    assert stream_is_idle(queue)
    ok("aclrtDestroyStream", queue)


def test_pinned_copies_are_asynchronous(on_device: int, pinned: int) -> None:
    queue = stream()
    with held(queue):
        ctypes.memset(pinned, 1, HUGE)
        assert memcpy_async(on_device, pinned, HUGE, HOST_TO_DEVICE, queue) == SUCCESS
        assert bytes_at(on_device, 2) == b"\xff\x7f", "not copied yet"
        ctypes.memset(pinned, 2, HUGE)
    ok("aclrtSynchronizeStream", queue)
    assert bytes_at(on_device, HUGE) == b"\2" * HUGE, "the source is read when the copy runs"
    ok("aclrtDestroyStream", queue)


def test_a_synchronous_copy_waits_for_no_stream(on_device: int, pinned: int) -> None:
    queue = stream()
    ctypes.memset(pinned, 3, HUGE)
    with held(queue):
        assert memcpy_async(on_device, pinned, HUGE, HOST_TO_DEVICE, queue) == SUCCESS
        assert memcpy(pinned, on_device, 2, DEVICE_TO_HOST) == SUCCESS
        assert bytes_at(pinned, 2) == b"\xff\x7f", "what is there before"
    ok("aclrtDestroyStream", queue)


def test_pageable_copies_complete_first(on_device: int, pageable: ctypes.Array) -> None:
    queue = stream()
    source = ctypes.addressof(pageable)
    for _ in range(20):
        assert memcpy_async(on_device, source, HUGE, HOST_TO_DEVICE, queue) == SUCCESS
        assert stream_is_idle(queue)
    assert bytes_at(on_device, HUGE) == pageable.raw
    ok("aclrtDestroyStream", queue)


def test_pageable_copies_first_wait_for_the_stream(
    on_device: int, pinned: int, pageable: ctypes.Array
) -> None:
    queue, source = stream(), ctypes.addressof(pageable)

    def change(_: object) -> None:
        time.sleep(0.05)
        ctypes.memset(source, 9, HUGE)

    function = HostFunction(change)
    ok("aclrtLaunchHostFunc", queue, function, None)
    assert memcpy_async(on_device, source, HUGE, HOST_TO_DEVICE, queue) == SUCCESS
    assert bytes_at(on_device, HUGE) == b"\x09" * HUGE
    control.set_faults(f"aclrtMemcpyAsync.work:1:{DRIVER}")
    assert memcpy_async(on_device, pinned, HUGE, HOST_TO_DEVICE, queue) == SUCCESS
    ctypes.memset(source, 8, HUGE)
    assert memcpy_async(on_device, source, HUGE, HOST_TO_DEVICE, queue) == DRIVER, (
        "of the one before"
    )
    assert bytes_at(on_device, HUGE) == b"\x09" * HUGE
    ok("aclrtDestroyStream", queue)


def test_part_of_a_pinned_range_is_pinned(on_device: int, pinned: int) -> None:
    queue = stream()
    with held(queue):
        assert memcpy_async(on_device, pinned + 64, 64, HOST_TO_DEVICE, queue) == SUCCESS
        assert not stream_is_idle(queue)
    ok("aclrtSynchronizeStream", queue)
    ok("aclrtDestroyStream", queue)


def test_fills(on_device: int) -> None:
    queue = stream()
    ok("aclrtMemset", on_device, c_size_t(HUGE), c_int32(9), c_size_t(MIB))
    end = on_device + MIB
    ok("aclrtMemsetAsync", end, c_size_t(MIB), c_int32(8), c_size_t(MIB), queue)
    ok("aclrtSynchronizeStream", queue)
    assert bytes_at(on_device, HUGE) == b"\x09" * MIB + b"\x08" * MIB
    refused = ("aclrtMemset", on_device, c_size_t(10), c_int32(9), c_size_t(11))
    assert call(*refused) == RT_PARAM
    ok("aclrtDestroyStream", queue)


def test_rows(on_device: int, pageable: ctypes.Array) -> None:
    ok("aclrtMemset", on_device, c_size_t(HUGE), c_int32(0), c_size_t(HUGE))
    sizes = (c_size_t(8), c_size_t(2), c_size_t(3))
    source = ctypes.addressof(pageable)
    ok("aclrtMemcpy2d", on_device, c_size_t(16), source, *sizes, HOST_TO_DEVICE)
    assert bytes_at(on_device, 34) == (b"ab" + b"\0" * 14) * 2 + b"ab"
    bad = ("aclrtMemcpy2d", on_device, c_size_t(1), source, *sizes, HOST_TO_DEVICE)
    assert call(*bad) == RT_PARAM


def test_batches(on_device: int, pinned: int) -> None:
    pointers, sizes = ctypes.c_void_p * 2, c_size_t * 2
    attributes = (ctypes.c_uint8 * 64)()
    failed = c_size_t()
    ctypes.memset(pinned, 4, HUGE)

    def batch(to: tuple[int, int], source: tuple[int, int], count: int) -> int:
        lengths = sizes(16, 16)
        return call(
            "aclrtMemcpyBatch",
            pointers(*to),
            lengths,
            pointers(*source),
            lengths,
            c_size_t(count),
            attributes,
            sizes(0, 0),
            c_size_t(1),
            byref(failed),
        )

    assert batch((on_device, on_device + 64), (pinned, pinned + 64), 2) == SUCCESS
    assert bytes_at(on_device, 16) == bytes_at(on_device + 64, 16) == b"\4" * 16
    assert bytes_at(on_device + 16, 2) == b"\xff\x7f"
    assert batch((on_device, pinned), (pinned, on_device), 2) == RT_PARAM, "two directions"
    assert failed.value == 1
    assert batch((on_device, on_device), (pinned, pinned), 4097) == RT_PARAM


def test_between_device_addresses(on_device: int) -> None:
    queue = stream()
    ok("aclrtMemset", on_device, c_size_t(64), c_int32(1), c_size_t(64))
    assert memcpy_async(on_device + MIB, on_device, 64, DEVICE_TO_DEVICE, queue) == SUCCESS
    ok("aclrtSynchronizeStream", queue)
    assert bytes_at(on_device + MIB, 64) == b"\1" * 64
    ok("aclrtDestroyStream", queue)


PENDING = """
queue = stream()
hold = HostFunction(lambda _: time.sleep(2))
host = malloc_host(HUGE)
memory = mapped()
ok('aclrtLaunchHostFunc', queue, hold, None)
assert memcpy_async(memory.address, host, 64, HOST_TO_DEVICE, queue) == SUCCESS
"""


@pytest.mark.parametrize(
    "code", ["call('aclrtUnmapMem', memory.address)", "call('aclrtFreeHost', host)"]
)
def test_taking_memory_from_work_in_flight_aborts(code: str) -> None:
    result = run_python(PENDING + code)
    assert result.returncode == -6
    assert "device fault" in result.stderr
    assert "synchronise first" in result.stderr


def test_freeing_memory_in_flight_aborts() -> None:
    result = run_python(
        PENDING.replace("memory = mapped()", "_, address = malloc(HUGE)").replace(
            "memory.address", "address"
        )
        + "call('aclrtFree', address)"
    )
    assert result.returncode == -6
    assert "device fault" in result.stderr


def test_unregistering_memory_in_flight_aborts() -> None:
    register = (
        "import mmap\n"
        "pages = ctypes.c_char.from_buffer(mmap.mmap(-1, HUGE))\n"
        "host = ctypes.addressof(pages)\n"
        "ok('aclrtHostRegisterV2', host, c_uint64(HUGE), c_uint32(REGISTER_PINNED))\n"
    )
    pending = PENDING.replace("host = malloc_host(HUGE)\n", register)
    result = run_python(pending + "call('aclrtHostUnregister', host)")
    assert result.returncode == -6
    assert "device fault" in result.stderr


def test_other_memory_may_go_while_work_is_in_flight() -> None:
    result = run_python(
        PENDING + "other = mapped()\nother.free()\nok('aclrtSynchronizeStream', queue)\n"
        "memory.free()\nok('aclrtFreeHost', host)"
    )
    assert result.returncode == 0, result.stderr
