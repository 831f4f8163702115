# SPDX-License-Identifier: Apache-2.0
"""Events in captures, and streams that join a capture by waiting for one of its events."""

import os
from collections.abc import Iterator
from ctypes import byref, c_int32, c_uint32, c_uint64, c_void_p

import pytest
from helpers.ascendcl import (
    RT_PARAM,
    SUCCESS,
    SYNC_TIMEOUT,
    UNSUPPORTED,
    HostFunction,
    call,
    elapsed_ms,
    event,
    held,
    ok,
    run_python,
    stream,
    streams_left,
)
from helpers.captures import (
    ACTIVE,
    ANOTHER_BEGAN,
    DEFAULT_STREAM,
    EVENT_CAPTURED,
    GROUP_INTERRUPTED,
    NONE,
    OTHER_GRAPH,
    RELAXED,
    RT_INTERNAL,
    SPOILED,
    STREAM_CAPTURED,
    TWO_GRAPHS,
    UNJOINED,
    begin,
    begin_group,
    captured,
    destroy,
    end,
    end_group,
    execute,
    info,
)

EXTERNAL = 0x20
EVENT_TIMEOUT = 507047


def record(mark: int, queue: int | None) -> int:
    return call("aclrtRecordEvent", mark, queue)


def wait(queue: int | None, mark: int) -> int:
    return call("aclrtStreamWaitEvent", queue, mark)


def old_event(flags: int = 1 | 8) -> int:
    handle = c_void_p()
    ok("aclrtCreateEventWithFlag", byref(handle), c_uint32(flags))
    return handle.value or 0


@pytest.fixture
def marks() -> Iterator[tuple[int, int, int]]:
    """Three events."""
    handles = (event(), event(), event())
    yield handles
    for handle in handles:
        ok("aclrtDestroyEvent", handle)


def test_a_stream_joins_and_comes_back(queue: int, other: int, marks: tuple[int, ...]) -> None:
    order: list[str] = []
    functions = {
        name: HostFunction(lambda _, name=name: order.append(name))
        for name in ("before", "beside", "after")
    }
    left = streams_left()
    with captured(queue) as graph:
        ok("aclrtLaunchHostFunc", queue, functions["before"], None)
        assert record(marks[0], queue) == SUCCESS
        assert info(other)[0] == NONE
        assert wait(other, marks[0]) == SUCCESS
        assert info(other) == info(queue)
        assert streams_left() == left - 2, "each captured stream takes one more"
        assert call("aclrtSynchronizeStream", other) == STREAM_CAPTURED
        assert begin(other) == STREAM_CAPTURED
        ok("aclrtLaunchHostFunc", other, functions["beside"], None)
        assert end(other) == (ANOTHER_BEGAN, 0)
        assert record(marks[1], other) == SUCCESS
        assert wait(queue, marks[1]) == SUCCESS
        ok("aclrtLaunchHostFunc", queue, functions["after"], None)
    assert info(other) == (NONE, 0)
    ok("aclrtSynchronizeStream", other)
    assert order == []
    for times in (1, 2):
        assert execute(graph.handle, queue) == SUCCESS
        ok("aclrtSynchronizeStream", queue)
        assert order == ["before", "beside", "after"] * times
    destroy(graph.handle)
    assert streams_left() == left


@pytest.mark.parametrize("back", ["nothing", "unrecorded", "unwaited", "work after", "not origin"])
def test_a_stream_that_does_not_come_back_fails_the_capture(
    queue: int, other: int, marks: tuple[int, ...], back: str
) -> None:
    third, nothing = stream(), HostFunction(lambda _: None)
    assert begin(queue) == SUCCESS
    graph = info(queue)[1]
    ok("aclrtRecordEvent", marks[0], queue)
    ok("aclrtStreamWaitEvent", other, marks[0])
    if back == "unrecorded":
        ok("aclrtLaunchHostFunc", other, nothing, None)
    if back in ("unwaited", "work after", "not origin"):
        ok("aclrtRecordEvent", marks[1], other)
    if back == "work after":
        ok("aclrtStreamWaitEvent", queue, marks[1])
        ok("aclrtLaunchHostFunc", other, nothing, None)
    if back == "not origin":
        ok("aclrtStreamWaitEvent", third, marks[1])
        ok("aclrtRecordEvent", marks[2], third)
        ok("aclrtStreamWaitEvent", other, marks[2])
        ok("aclrtRecordEvent", marks[1], other)
        ok("aclrtStreamWaitEvent", third, marks[1])
        ok("aclrtRecordEvent", marks[2], third)
    assert end(queue) == (UNJOINED, 0)
    assert info(queue) == info(other) == info(third) == (NONE, 0), "all have left"
    assert call("aclmdlRIDestroy", graph) != SUCCESS
    ok("aclrtDestroyStream", third)


def test_events_of_a_capture(queue: int, other: int, marks: tuple[int, ...]) -> None:
    mark, before, never = marks
    ok("aclrtRecordEvent", before, other)
    assert begin(queue, RELAXED) == SUCCESS
    assert wait(queue, before) == OTHER_GRAPH
    assert wait(queue, never) == SUCCESS, "there is nothing to wait for"
    ok("aclrtSynchronizeEvent", before)
    ok("aclrtStreamWaitEvent", other, before)
    assert record(mark, queue) == SUCCESS
    assert call("aclrtSynchronizeEvent", mark) == EVENT_CAPTURED
    assert call("aclrtSynchronizeEventWithTimeout", mark, 10) == EVENT_CAPTURED
    for ask in ("aclrtQueryEvent", "aclrtQueryEventStatus", "aclrtQueryEventWaitStatus"):
        assert call(ask, mark, byref(c_int32())) == EVENT_CAPTURED
    assert call("aclrtEventGetTimestamp", mark, byref(c_uint64())) == EVENT_CAPTURED
    assert elapsed_ms(before, mark)[0] == EVENT_CAPTURED
    assert wait(None, mark) == DEFAULT_STREAM
    assert info(queue)[0] == ACTIVE
    code, graph = end(queue)
    assert code == SUCCESS
    with held(queue):
        assert execute(graph, queue) == SUCCESS
        ok("aclrtStreamWaitEvent", other, mark)
        ok("aclrtSynchronizeStream", other)  # the graph has its own copy of the event
    ok("aclrtSynchronizeEvent", mark)
    ok("aclrtSynchronizeStream", queue)
    destroy(graph)


def test_which_events_can_be_captured(queue: int, other: int) -> None:
    old, timed = old_event(), event(8)
    assert wait(other, timed) == UNSUPPORTED, "streams do not know it"
    assert call("aclrtResetEvent", timed, other) == UNSUPPORTED
    ok("aclrtResetEvent", old, other)
    with captured(queue) as graph:
        assert record(old, queue) == wait(queue, old) == UNSUPPORTED
        assert call("aclrtResetEvent", old, queue) == UNSUPPORTED
        assert record(timed, queue) == SUCCESS
        ok("aclrtSynchronizeEvent", timed)  # it records nothing
    destroy(graph.handle)
    for mark in (old, timed):
        ok("aclrtDestroyEvent", mark)


def test_captures_are_not_merged(queue: int, other: int, marks: tuple[int, ...]) -> None:
    assert begin(queue) == begin(other) == SUCCESS
    ok("aclrtRecordEvent", marks[0], queue)
    assert wait(other, marks[0]) == TWO_GRAPHS
    third = stream()
    assert wait(third, marks[0]) == RT_INTERNAL, "it is spoiled"
    assert end(queue) == end(other) == (SPOILED, 0)
    ok("aclrtDestroyStream", third)


def test_a_group_is_interrupted_by_other_streams_of_the_capture(
    queue: int, other: int, marks: tuple[int, ...]
) -> None:
    assert begin(queue) == SUCCESS
    ok("aclrtRecordEvent", marks[0], queue)
    ok("aclrtStreamWaitEvent", other, marks[0])
    assert begin_group(queue) == SUCCESS
    assert record(marks[1], other) == GROUP_INTERRUPTED
    assert end_group(queue) == (GROUP_INTERRUPTED, 0)
    assert end(queue) == (SPOILED, 0)


def test_external_events_are_tasks_of_a_graph(queue: int, other: int) -> None:
    """Another stream releases the graph. After a reset the graph waits for the event again."""
    calls: list[int] = []
    note = HostFunction(lambda _: calls.append(1))
    gate = old_event(EXTERNAL)
    with captured(queue) as graph:
        assert wait(queue, gate) == SUCCESS
        ok("aclrtResetEvent", gate, queue)
        ok("aclrtLaunchHostFunc", queue, note, None)
    for times in (1, 2):
        assert execute(graph.handle, queue) == SUCCESS
        assert call("aclrtSynchronizeStreamWithTimeout", queue, 50) == SYNC_TIMEOUT
        assert len(calls) == times - 1
        ok("aclrtRecordEvent", gate, other)
        ok("aclrtSynchronizeStream", queue)
        assert len(calls) == times
    destroy(graph.handle)
    with held(other):
        ok("aclrtRecordEvent", gate, other)
        assert call("aclrtSynchronizeEventWithTimeout", gate, 20) == EVENT_TIMEOUT
    ok("aclrtSynchronizeEvent", gate)
    ok("aclrtDestroyEvent", gate)
    assert call("aclrtCreateEventWithFlag", byref(c_void_p()), c_uint32(EXTERNAL | 1)) == RT_PARAM
    assert call("aclrtCreateEventExWithFlag", byref(c_void_p()), c_uint32(EXTERNAL)) == RT_PARAM


def test_a_join_needs_a_stream_of_the_device() -> None:
    result = run_python(
        "from helpers.captures import *\n"
        "queue, other, mark = stream(), stream(), event()\n"
        "while streams_left() > 1: stream()\n"
        "assert begin(queue) == 0\n"
        "ok('aclrtRecordEvent', mark, queue)\n"
        "assert call('aclrtStreamWaitEvent', other, mark) == NO_RESOURCE\n"
        "assert info(other) == (NONE, 0)\n"
        "assert end(queue) == (SPOILED, 0)\n"
        "assert streams_left() == 1\n",
        NPU_SIM_MACHINE=f"joins-{os.getpid()}",
        NPU_SIM_STREAMS="6",
    )
    assert result.returncode == 0, result.stderr
