# SPDX-License-Identifier: Apache-2.0
"""Calls that fail or are slow on request, and counts of calls."""

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.ascendcl import (
    DRIVER,
    HOST_TO_DEVICE,
    HUGE,
    NO_CONTEXT,
    RT_PARAM,
    SUCCESS,
    SYNC_TIMEOUT,
    bytes_at,
    call,
    malloc,
    malloc_host,
    malloc_physical,
    map_mem,
    mapped,
    memcpy,
    memcpy_async,
    message,
    ok,
    physical,
    reserve,
    run_python,
    stream,
    stream_is_idle,
)
from helpers.patience import wait_for

from vllm_sleep_ascend.sim import control


def results(count: int) -> list[int]:
    return [call("aclrtSynchronizeDevice") for _ in range(count)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("aclrtSynchronizeDevice:1:507899", [DRIVER, 0, 0, 0]),
        ("aclrtSynchronizeDevice:3:507899", [0, 0, DRIVER, 0]),
        ("aclrtSynchronizeDevice:2:507899:2", [0, DRIVER, DRIVER, 0]),
        ("aclrtSynchronizeDevice:2:507899:*", [0, DRIVER, DRIVER, DRIVER]),
        ("aclrtSynchronizeStream:1:507899:*", [0, 0, 0, 0]),
        ("aclrtSynchronizeDevice:1:1,aclrtSynchronizeDevice:3:2", [1, 0, 2, 0]),
    ],
)
def test_the_nth_call_fails(rule: str, expected: list[int]) -> None:
    control.set_faults(rule)
    assert results(4) == expected
    assert control.fault_hits() == sum(code != 0 for code in expected)


def test_rules_replace_each_other_and_count_from_then() -> None:
    control.set_faults("aclrtSynchronizeDevice:2:1")
    assert results(1) == [0]
    control.set_faults("aclrtSynchronizeDevice:2:1")
    assert results(2) == [0, 1]
    control.set_faults("")
    assert results(3) == [0, 0, 0]


def test_a_failed_call_says_so() -> None:
    control.set_faults("aclrtSynchronizeDevice:1:507899")
    results(1)
    assert "aclrtSynchronizeDevice" in message()


@pytest.mark.parametrize(
    "rule", ["aclrtMapMem", "aclrtMapMem:0:1", "aclrtMapMem:1:x", "a:1:1:1:1", "a:1:delay_ms="]
)
def test_rules_that_are_not_understood(rule: str) -> None:
    control.set_faults("aclrtSynchronizeDevice:1:1")
    with pytest.raises(ValueError):
        control.set_faults(rule)
    assert results(1) == [1], "the rules before stay"


def test_a_failed_call_has_no_effect() -> None:
    names = [
        "aclrtMallocPhysical",
        "aclrtReserveMemAddress",
        "aclrtMapMem",
        "aclrtUnmapMem",
        "aclrtFreePhysical",
        "aclrtReleaseMemAddress",
        "aclrtMemcpy",
        "aclrtMalloc",
        "aclrtMallocHost",
        "aclrtFree",
        "aclrtFreeHost",
    ]
    memory, host, (_, pointer) = mapped(), malloc_host(HUGE), malloc(HUGE)
    ctypes.memset(host, 1, HUGE)
    before = control.counters()
    control.set_faults(",".join(f"{name}:1:{DRIVER}:*" for name in names))
    address = ctypes.c_void_p()
    size = ctypes.c_size_t(HUGE)
    zero = ctypes.c_size_t(0)
    reserved = ("aclrtReserveMemAddress", ctypes.byref(address), size, zero, None, zero)
    assert call(*reserved) == DRIVER
    assert malloc_physical(HUGE)[0] == DRIVER
    assert map_mem(memory.address, HUGE, memory.handle) == DRIVER
    assert memcpy(memory.address, host, HUGE, HOST_TO_DEVICE) == DRIVER
    assert bytes_at(memory.address, 2) == b"\xff\x7f"
    assert malloc(HUGE)[0] == DRIVER
    for name, argument in (
        ("aclrtUnmapMem", memory.address),
        ("aclrtFreePhysical", memory.handle),
        ("aclrtReleaseMemAddress", memory.address),
        ("aclrtFree", pointer),
        ("aclrtFreeHost", host),
    ):
        assert call(name, argument) == DRIVER
    assert control.counters() == before
    assert address.value is None
    control.set_faults("")
    memory.free()
    ok("aclrtFree", pointer)
    ok("aclrtFreeHost", host)


def test_a_failed_map_can_be_repeated() -> None:
    address, handle = reserve(HUGE), physical(HUGE)
    control.set_faults(f"aclrtMapMem:1:{DRIVER}")
    assert map_mem(address, HUGE, handle) == DRIVER
    assert map_mem(address, HUGE, handle) == SUCCESS
    ok("aclrtUnmapMem", address)
    ok("aclrtFreePhysical", handle)
    ok("aclrtReleaseMemAddress", address)


def test_a_slow_call_succeeds() -> None:
    control.set_faults("aclrtSynchronizeDevice:2:delay_ms=1500")
    assert results(1) == [0]
    assert control.fault_hits() == 0
    started = time.monotonic()
    assert results(1) == [0]
    assert time.monotonic() - started >= 1.5
    assert control.fault_hits() == 1


def test_a_slow_call_ends_when_other_rules_come() -> None:
    control.set_faults("aclrtSynchronizeDevice:1:delay_ms=600000")
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(call, "aclrtSynchronizeDevice")
        wait_for(lambda: control.fault_hits() == 1)
        assert not slow.done()
        control.set_faults("")
        assert slow.result(60) == NO_CONTEXT, "a thread without a device"


def test_counts() -> None:
    control.reset_counters()
    results(3)
    assert control.call_count("aclrtSynchronizeDevice") == 3
    assert control.call_count("aclrtMapMem") == 0
    assert control.call_count("no such call") == 0
    assert malloc(0)[0] == RT_PARAM
    assert control.call_count("aclrtMalloc") == 1, "refused calls count"
    control.reset_counters()
    assert control.call_count("aclrtSynchronizeDevice") == 0


def test_the_log_is_in_order() -> None:
    control.keep_call_log(True)
    mapped().free()
    log = control.call_log()
    control.keep_call_log(False)
    assert log == [
        "aclrtReserveMemAddress",
        "aclrtMallocPhysical",
        "aclrtMapMem",
        "aclrtUnmapMem",
        "aclrtFreePhysical",
        "aclrtReleaseMemAddress",
    ]
    results(1)
    assert control.call_log() == []


def test_rules_from_the_environment() -> None:
    code = "print(*(call('aclrtSynchronizeDevice') for _ in range(3)))"
    result = run_python(code, NPU_SIM_FAULTS="aclrtSynchronizeDevice:2:507899")
    assert result.stdout.split() == ["0", "507899", "0"]
    result = run_python(code, NPU_SIM_FAULTS="nonsense")
    assert result.returncode == -6
    assert "nonsense" in result.stderr


def test_rules_from_a_file_that_changes(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    code = (
        "def code(): time.sleep(0.02); return call('aclrtSynchronizeDevice')\n"
        f"path = {os.fspath(rules)!r}\n"
        "print(code())\n"
        "open(path, 'w').write('aclrtSynchronizeDevice:1:507899')\n"
        "print(code(), code())\n"
        "open(path, 'w').write('aclrtSynchronizeDevice:1:207001:*')\n"
        "print(code(), code())\n"
        "os.remove(path)\n"
        "print(code())\n"
    )
    result = run_python(code, NPU_SIM_FAULTS_FILE=os.fspath(rules))
    expected = ["0", "507899", "0", "207001", "207001", "0"]
    assert result.stdout.split() == expected, result.stderr


def test_communication_can_fail_too() -> None:
    hccl = ctypes.CDLL("libhccl.so")
    control.set_faults("HcclGetRootInfo:1:4")
    info = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(info) == 4
    assert hccl.HcclGetRootInfo(info) == 0


def test_a_copy_that_fails_after_its_launch() -> None:
    host, queue = malloc_host(HUGE), stream()
    _, address = malloc(HUGE)
    control.set_faults(f"aclrtMemcpyAsync.work:1:{DRIVER}")
    assert memcpy_async(address, host, HUGE, HOST_TO_DEVICE, queue) == SUCCESS
    assert stream_is_idle(queue), "asking tells nothing"
    assert call("aclrtSynchronizeStream", queue) == DRIVER
    assert call("aclrtSynchronizeStream", queue) == SUCCESS, "it is told once"
    ok("aclrtDestroyStream", queue)
    ok("aclrtFree", address)
    ok("aclrtFreeHost", host)


def test_a_copy_that_never_completes() -> None:
    host, queue, other = malloc_host(HUGE), stream(), stream()
    _, address = malloc(HUGE)
    ctypes.memset(host, 5, HUGE)
    control.set_faults("aclrtMemcpyAsync.work:1:delay_ms=1000000000")
    assert memcpy_async(address, host, HUGE, HOST_TO_DEVICE, queue) == SUCCESS
    assert memcpy_async(address, host, 64, HOST_TO_DEVICE, other) == SUCCESS
    ok("aclrtSynchronizeStream", other)
    assert call("aclrtSynchronizeStreamWithTimeout", queue, 50) == SYNC_TIMEOUT
    assert bytes_at(address, HUGE) == b"\5" * 64 + b"\xff\x7f" * ((HUGE - 64) // 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_in_a_thread, queue)
        control.set_faults("")
        assert waiting.result() == SUCCESS
    assert bytes_at(address, HUGE) == b"\5" * HUGE
    for each in (queue, other):
        ok("aclrtDestroyStream", each)
    ok("aclrtFree", address)
    ok("aclrtFreeHost", host)


def wait_in_a_thread(queue: int) -> int:
    ok("aclrtSetDevice", 0)
    return call("aclrtSynchronizeStream", queue)
