# SPDX-License-Identifier: Apache-2.0
"""Streams that capture a graph, and what is refused during a capture."""

import os
from ctypes import (
    addressof,
    byref,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
    create_string_buffer,
)

import pytest
from helpers.ascendcl import (
    DEVICE_TO_HOST,
    HANDLE,
    HOST_TO_DEVICE,
    HUGE,
    INVALID_PARAM,
    NO_CONTEXT,
    NO_RESOURCE,
    OTHER_CONTEXT,
    RT_PARAM,
    SUCCESS,
    SYNC_TIMEOUT,
    HostFunction,
    Mapped,
    bytes_at,
    call,
    event,
    held,
    memcpy,
    memcpy_async,
    message,
    ok,
    run_python,
    stream_is_idle,
    streams_left,
)
from helpers.captures import (
    ACTIVE,
    DEFAULT_STREAM,
    GLOBAL,
    GRAPH_CAPTURED,
    INVALIDATED,
    MODE_FORBIDS,
    MODE_FORBIDS_ASYNC,
    NONE,
    NOT_CAPTURED,
    OTHER_CONTEXTS_GRAPH,
    RELAXED,
    RT_INTERNAL,
    SPOILED,
    STREAM_CAPTURED,
    THREAD_LOCAL,
    WRONG_THREAD,
    begin,
    end,
    exchange,
    in_a_thread,
    info,
)

from vllm_sleep_ascend.sim import control


def test_an_empty_capture(queue: int) -> None:
    left = streams_left()
    assert info(queue) == (NONE, 0)
    assert begin(queue) == SUCCESS
    assert streams_left() == left - 1, "a capture takes one more stream"
    status, graph = info(queue)
    assert status == ACTIVE
    assert call("aclmdlRIDestroy", graph) == GRAPH_CAPTURED
    assert end(queue) == (SUCCESS, graph)
    assert info(queue) == (NONE, 0)
    assert streams_left() == left - 1, "the graph keeps it"
    ok("aclmdlRIDestroy", graph)
    assert streams_left() == left
    assert call("aclmdlRIDestroy", graph) == HANDLE
    ok("aclrtSynchronizeStream", queue)


def test_what_a_capture_refuses_at_its_begin_and_end(queue: int) -> None:
    assert begin(None) == INVALID_PARAM, "the default stream"
    assert end(None)[0] == INVALID_PARAM
    assert begin(queue, 3) == begin(queue, -1) == RT_PARAM
    assert end(queue) == (NOT_CAPTURED, 0)
    assert begin(queue) == SUCCESS
    assert begin(queue) == begin(queue, RELAXED) == STREAM_CAPTURED
    assert call("aclmdlRICaptureEnd", queue, None) == RT_PARAM
    code, graph = end(queue)
    assert code == SUCCESS
    assert end(queue)[0] == NOT_CAPTURED
    ok("aclmdlRIDestroy", graph)
    assert call("aclmdlRIDestroy", None) == INVALID_PARAM
    assert call("aclmdlRIDestroy", queue) == HANDLE
    for invalid in (
        call("aclmdlRICaptureGetInfo", None, byref(c_int32()), None),
        call("aclmdlRICaptureGetInfo", queue, None, None),
        call("aclmdlRICaptureThreadExchangeMode", None),
    ):
        assert invalid == INVALID_PARAM
    assert call("aclmdlRICaptureThreadExchangeMode", byref(c_int32(3))) == RT_PARAM
    assert call("aclmdlRICaptureGetInfo", graph, byref(c_int32()), None) == HANDLE


@pytest.mark.parametrize(
    ("flags", "code"), [(1 | 2 | 8, SUCCESS), (4, SUCCESS), (16, RT_INTERNAL), (32, RT_INTERNAL)]
)
def test_which_streams_can_capture(flags: int, code: int) -> None:
    queue = c_void_p()
    ok("aclrtCreateStreamWithConfig", byref(queue), c_uint32(0), c_uint32(flags))
    assert begin(queue.value) == code
    if code == SUCCESS:
        # Synchronising the device ignores streams that are not waited for.
        expected = SUCCESS if flags == 4 else STREAM_CAPTURED
        assert call("aclrtSynchronizeDevice") == expected
        ok("aclmdlRIDestroy", end(queue.value)[1])
    ok("aclrtDestroyStream", queue)


def test_a_capture_needs_a_stream_of_the_device() -> None:
    result = run_python(
        "queues = [stream() for _ in range(4)]\n"
        f"assert call('aclmdlRICaptureBegin', queues[0], 0) == {NO_RESOURCE}\n"
        "assert 'Alloc sq cq fail' in message()\n"
        "ok('aclrtDestroyStream', queues.pop())\n"
        "ok('aclmdlRICaptureBegin', queues[0], 0)\n"
        f"assert call('aclrtCreateStream', byref(c_void_p())) == {NO_RESOURCE}\n"
        "ok('aclrtResetDevice', 0)\n"
        "ok('aclrtSetDevice', 0)\n"
        "assert streams_left() == 4, 'a device that is reset gives all back'\n",
        NPU_SIM_MACHINE=f"graphs-{os.getpid()}",
        NPU_SIM_STREAMS="5",
    )
    assert result.returncode == 0, result.stderr


def test_a_capturing_stream_is_not_waited_for(queue: int, other: int) -> None:
    assert begin(queue, RELAXED) == SUCCESS
    for _ in range(2):
        assert call("aclrtSynchronizeStream", queue) == STREAM_CAPTURED
        assert call("aclrtSynchronizeStreamWithTimeout", queue, 100) == STREAM_CAPTURED
        assert call("aclrtStreamQuery", queue, byref(c_int32())) == STREAM_CAPTURED
        assert call("aclrtDestroyStream", queue) == STREAM_CAPTURED
        assert call("aclrtDestroyStreamForce", queue) == STREAM_CAPTURED
        assert call("aclrtSynchronizeDevice") == STREAM_CAPTURED
        assert in_a_thread(lambda: call("aclrtSynchronizeDevice")) == STREAM_CAPTURED
        with held(other):
            assert call("aclrtSynchronizeDeviceWithTimeout", 20) == STREAM_CAPTURED, "at once"
            assert call("aclrtSynchronizeStreamWithTimeout", other, 20) == SYNC_TIMEOUT
        ok("aclrtSynchronizeStream", other)
        ok("aclrtSynchronizeStream", None)
        assert stream_is_idle(other)
    assert info(queue)[0] == ACTIVE, "the capture goes on"
    code, graph = end(queue)
    assert code == SUCCESS
    ok("aclrtSynchronizeDevice")
    ok("aclmdlRIDestroy", graph)


def test_other_contexts_do_not_notice() -> None:
    result = run_python(
        "ours, other, graph = c_void_p(), c_void_p(), c_void_p()\n"
        "queue, (_, memory), host = stream(), malloc(HUGE), malloc_host(HUGE)\n"
        "ok('aclrtGetCurrentContext', byref(ours))\n"
        "ok('aclmdlRICaptureBegin', queue, 0)\n"
        "ok('aclrtCreateContext', byref(other), 0)\n"
        "ok('aclrtSynchronizeDevice')\n"
        "assert memcpy(memory, host, HUGE, HOST_TO_DEVICE) == 0, message()\n"
        "assert memcpy_async(memory, host, HUGE, HOST_TO_DEVICE, stream()) == 0, message()\n"
        "ok('aclrtSynchronizeDevice')\n"
        f"assert call('aclmdlRICaptureEnd', queue, byref(graph)) == {OTHER_CONTEXT}\n"
        f"assert call('aclmdlRICaptureBegin', queue, 0) == {OTHER_CONTEXT}\n"
        "ok('aclrtSetCurrentContext', ours)\n"
        "ok('aclmdlRICaptureEnd', queue, byref(graph))\n"
        "ok('aclrtSetCurrentContext', other)\n"
        f"assert call('aclmdlRIDestroy', graph) == {OTHER_CONTEXTS_GRAPH}\n"
        "left = streams_left()\n"
        "theirs = stream()\n"
        "ok('aclmdlRICaptureBegin', theirs, 0)\n"
        "ok('aclrtDestroyContext', other)\n"
        f"assert call('aclmdlRIDestroy', graph) == {NO_CONTEXT}\n"
        "ok('aclrtSetCurrentContext', ours)\n"
        "ok('aclrtSynchronizeDevice')\n"
        "ok('aclmdlRIDestroy', graph)\n"
        "assert streams_left() == left + 3, 'the default stream, stream() and the graph'\n"
    )
    assert result.returncode == 0, result.stderr


def waiting_copies(memory: int, host: int) -> list[int]:
    size = c_size_t(HUGE)
    return [
        memcpy(memory, host, HUGE, HOST_TO_DEVICE),
        memcpy(host, memory, HUGE, DEVICE_TO_HOST),
        call("aclrtMemset", memory, size, 1, size),
        call("aclrtMemcpy2d", memory, size, host, size, size, c_size_t(1), HOST_TO_DEVICE),
        batch(memory, host),
    ]


def batch(memory: int, host: int) -> int:
    one = c_size_t * 1
    attributes = (c_uint64 * 64)()
    return call(
        "aclrtMemcpyBatch",
        (c_void_p * 1)(memory),
        one(HUGE),
        (c_void_p * 1)(host),
        one(HUGE),
        c_size_t(1),
        attributes,
        one(0),
        c_size_t(1),
        byref(c_size_t()),
    )


@pytest.mark.parametrize(
    ("captures", "exchanged", "elsewhere", "allowed"),
    [
        (GLOBAL, GLOBAL, False, False),
        (GLOBAL, GLOBAL, True, False),
        (GLOBAL, THREAD_LOCAL, False, False),
        (GLOBAL, THREAD_LOCAL, True, True),
        (GLOBAL, RELAXED, False, True),
        (GLOBAL, RELAXED, True, True),
        (THREAD_LOCAL, GLOBAL, False, False),
        (THREAD_LOCAL, GLOBAL, True, True),
        (THREAD_LOCAL, THREAD_LOCAL, False, False),
        (THREAD_LOCAL, RELAXED, False, True),
        (RELAXED, GLOBAL, False, True),
        (RELAXED, THREAD_LOCAL, True, True),
    ],
)
def test_copies_that_wait_are_refused_by_mode_and_spoil_the_capture(
    memory: Mapped,
    host: int,
    queue: int,
    captures: int,
    exchanged: int,
    elsewhere: bool,
    allowed: bool,
) -> None:
    def copy() -> list[int]:
        assert exchange(exchanged) == GLOBAL, "of a new thread"
        codes = waiting_copies(memory.address, host)
        assert exchange(GLOBAL) == exchanged
        return codes

    assert waiting_copies(memory.address, host) == [SUCCESS] * 5
    assert begin(queue, captures) == SUCCESS
    codes = in_a_thread(copy) if elsewhere else copy()
    assert codes == [SUCCESS if allowed else MODE_FORBIDS] * 5
    assert info(queue)[0] == (ACTIVE if allowed else INVALIDATED)
    code, graph = end(queue)
    assert code == (SUCCESS if allowed else SPOILED)
    assert bool(graph) == allowed
    if allowed:
        ok("aclmdlRIDestroy", graph)
    assert waiting_copies(memory.address, host) == [SUCCESS] * 5, "the capture is over"


def test_a_refused_copy_moves_nothing_and_spoils_captures_that_forbid_it_alone(
    memory: Mapped, host: int, queue: int, other: int
) -> None:
    ok("aclrtMemset", memory.address, c_size_t(HUGE), 7, c_size_t(HUGE))
    assert begin(queue) == begin(other, RELAXED) == SUCCESS
    assert memcpy(memory.address, host, HUGE, HOST_TO_DEVICE) == MODE_FORBIDS
    assert "aclmdlRICaptureThreadExchangeMode" in message()
    assert (info(queue)[0], info(other)[0]) == (INVALIDATED, ACTIVE)
    assert call("aclrtSynchronizeStream", queue) == STREAM_CAPTURED, "until its end"
    assert call("aclrtSynchronizeDevice") == STREAM_CAPTURED
    assert begin(queue) == STREAM_CAPTURED
    spoiled = info(queue)[1]
    assert end(queue) == (SPOILED, 0)
    assert call("aclmdlRIDestroy", spoiled) == HANDLE
    assert memcpy(host, memory.address, HUGE, DEVICE_TO_HOST) == SUCCESS, "RELAXED alone is left"
    assert bytes_at(host, HUGE) == b"\x07" * HUGE
    ok("aclmdlRIDestroy", end(other)[1])


def test_copies_of_memory_that_is_not_page_locked(memory: Mapped, queue: int, other: int) -> None:
    pageable = create_string_buffer(1024)

    def copy(target: int) -> int:
        return memcpy_async(memory.address, addressof(pageable), 1024, HOST_TO_DEVICE, target)

    assert begin(queue) == SUCCESS
    assert copy(queue) == RT_PARAM
    assert info(queue)[0] == ACTIVE
    exchange(RELAXED)
    assert copy(queue) == RT_PARAM, "in no mode"
    assert copy(other) == SUCCESS
    assert info(queue)[0] == ACTIVE
    exchange(GLOBAL)
    assert copy(other) == MODE_FORBIDS_ASYNC, "it is a copy that waits"
    assert info(queue)[0] == INVALIDATED
    assert end(queue)[0] == SPOILED
    assert copy(queue) == copy(other) == SUCCESS


NOTHING = HostFunction(lambda _: None)


@pytest.mark.parametrize("kind", ["copy", "fill", "function", "record", "wait"])
def test_the_default_stream_takes_no_work_meanwhile(
    memory: Mapped, host: int, queue: int, other: int, kind: str
) -> None:
    mark = event()

    def launch(target: int | None) -> int:
        if kind == "copy":
            return memcpy_async(memory.address, host, HUGE, HOST_TO_DEVICE, target)
        if kind == "fill":
            size = c_size_t(HUGE)
            return call("aclrtMemsetAsync", memory.address, size, 0, size, target)
        if kind == "function":
            return call("aclrtLaunchHostFunc", target, NOTHING, None)
        if kind == "wait":
            return call("aclrtStreamWaitEvent", target, mark)
        return call("aclrtRecordEvent", mark, target)

    assert begin(queue, RELAXED) == SUCCESS
    assert launch(other) == SUCCESS, "streams that do not capture work as ever"
    assert launch(None) == DEFAULT_STREAM
    assert info(queue)[0] == ACTIVE
    ok("aclmdlRIDestroy", end(queue)[1])
    assert launch(None) == SUCCESS
    for target in (None, other):
        ok("aclrtSynchronizeStream", target)
    ok("aclrtDestroyEvent", mark)


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL])
def test_another_thread_ends_no_capture(queue: int, mode: int) -> None:
    left = streams_left()
    assert begin(queue, mode) == SUCCESS
    graph = info(queue)[1]
    assert in_a_thread(lambda: end(queue)) == (WRONG_THREAD, 0)
    assert info(queue) == (NONE, 0), "it is dropped"
    assert end(queue)[0] == NOT_CAPTURED
    ok("aclrtSynchronizeDevice")
    assert streams_left() == left - 1, "its graph is not"
    ok("aclmdlRIDestroy", graph)


def test_another_thread_ends_a_relaxed_capture(queue: int) -> None:
    assert begin(queue, RELAXED) == SUCCESS
    code, graph = in_a_thread(lambda: end(queue))
    assert code == SUCCESS
    ok("aclmdlRIDestroy", graph)


def test_each_call_can_fail(queue: int) -> None:
    rule = "aclmdlRI{}:1:507899".format
    control.set_faults(rule("CaptureBegin"))
    assert begin(queue) == 507899
    assert info(queue)[0] == NONE
    ok("aclmdlRICaptureBegin", queue, RELAXED)
    control.set_faults(",".join(map(rule, ("CaptureGetInfo", "CaptureEnd", "Destroy"))))
    assert call("aclmdlRICaptureGetInfo", queue, byref(c_int32()), None) == 507899
    assert end(queue)[0] == 507899
    code, graph = end(queue)
    assert code == SUCCESS
    assert call("aclmdlRIDestroy", graph) == 507899
    ok("aclmdlRIDestroy", graph)
    control.set_faults(rule("CaptureThreadExchangeMode"))
    assert call("aclmdlRICaptureThreadExchangeMode", byref(c_int32(RELAXED))) == 507899
    assert exchange(GLOBAL) == GLOBAL
