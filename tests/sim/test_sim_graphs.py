# SPDX-License-Identifier: Apache-2.0
"""Graphs through AscendCL: what is recorded, executed, exchanged and destroyed."""

import json
import threading
from ctypes import c_size_t, memset
from pathlib import Path

from helpers.ascendcl import (
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    HANDLE,
    HOST_TO_DEVICE,
    HUGE,
    INVALID_PARAM,
    OTHER_CONTEXT,
    RT_PARAM,
    SUCCESS,
    SYNC_TIMEOUT,
    HostFunction,
    Mapped,
    bytes_at,
    call,
    held,
    memcpy_async,
    message,
    ok,
    run_python,
    streams_left,
)
from helpers.captures import (
    DEFAULT_STREAM,
    GRAPH_BUSY,
    GRAPH_CAPTURED,
    GRAPH_EXECUTED,
    GROUP_STATUS,
    NO_KERNEL,
    NOT_CAPTURED,
    SPOILED,
    STREAM_CAPTURED,
    begin,
    begin_group,
    captured,
    destroy,
    end,
    end_group,
    execute,
    in_a_thread,
    info,
)
from helpers.patience import wait_for

from vllm_sleep_ascend.sim import control

HALF = HUGE // 2


def fill(address: int, value: int, queue: int, size: int = HUGE) -> int:
    return call("aclrtMemsetAsync", address, c_size_t(size), value, c_size_t(size), queue)


def test_work_is_recorded_and_done_at_each_execution(
    memory: Mapped, host: int, queue: int, other: int
) -> None:
    calls: list[int] = []
    note = HostFunction(lambda _: calls.append(bytes_at(memory.address, 1)[0]))
    memset(host, 1, HUGE)
    assert fill(memory.address, 9, queue) == SUCCESS
    with captured(queue) as graph:
        assert memcpy_async(memory.address, host, HALF, HOST_TO_DEVICE, queue) == SUCCESS
        ok("aclrtLaunchHostFunc", queue, note, None)
        second = memory.address + HALF
        assert memcpy_async(second, memory.address, HALF, DEVICE_TO_DEVICE, queue) == SUCCESS
        assert fill(memory.address, 4, queue, HALF) == SUCCESS
        assert memcpy_async(host, second, HALF, DEVICE_TO_HOST, queue) == SUCCESS
    ok("aclrtSynchronizeStream", queue)
    assert bytes_at(memory.address, HUGE) == b"\x09" * HUGE, "nothing is done while it captures"
    assert calls == []
    for value, target in enumerate((queue, other, None), start=2):
        memset(host, value, HUGE)
        assert execute(graph.handle, target) == SUCCESS
        ok("aclrtSynchronizeStream", target)
        assert bytes_at(memory.address, HUGE) == b"\x04" * HALF + bytes([value]) * HALF
        assert bytes_at(host, HALF) == bytes([value]) * HALF
    assert calls == [2, 3, 4]
    destroy(graph.handle)


def test_executing_is_asynchronous_and_in_the_order_of_the_stream(
    memory: Mapped, queue: int
) -> None:
    with captured(queue) as graph:
        assert fill(memory.address, 3, queue) == SUCCESS
    with held(queue):
        assert execute(graph.handle, queue) == SUCCESS
        assert fill(memory.address, 5, queue, HALF) == SUCCESS
        assert execute(graph.handle, queue) == SUCCESS
        assert fill(memory.address, 6, queue, HALF) == SUCCESS
        assert call("aclrtSynchronizeStreamWithTimeout", queue, 20) == SYNC_TIMEOUT
        assert bytes_at(memory.address, 1) != b"\x03"
    ok("aclrtSynchronizeStream", queue)
    assert bytes_at(memory.address, HUGE) == b"\x06" * HALF + b"\x03" * HALF
    destroy(graph.handle)


def test_what_executing_refuses(queue: int, other: int) -> None:
    assert execute(0, queue) == INVALID_PARAM
    assert execute(queue, queue) == HANDLE
    assert begin(queue) == SUCCESS
    graph = info(queue)[1]
    assert execute(graph, other) == GRAPH_CAPTURED
    with captured(other) as second:
        pass
    assert execute(second.handle, queue) == STREAM_CAPTURED
    assert execute(second.handle, other) == SUCCESS, "a stream that does not capture"
    assert execute(second.handle, None) == DEFAULT_STREAM
    assert end(queue) == (SUCCESS, graph), "nothing of it spoiled the capture"
    ok("aclrtSynchronizeStream", other)
    for timeout, code in ((0, RT_PARAM), (-1, RT_PARAM), (100, RT_PARAM)):
        assert call("aclmdlRIExecute", graph, timeout) == code
    assert "aclmdlRIExecuteAsync alone" in message()
    assert call("aclmdlRIExecute", None, -1) == INVALID_PARAM
    assert call("aclmdlRIExecute", queue, -1) == HANDLE
    for handle in (graph, second.handle):
        destroy(handle)
    assert execute(graph, queue) == HANDLE


def test_a_graph_is_executed_in_its_context() -> None:
    result = run_python(
        "from helpers.captures import *\n"
        "ours, other, queue = c_void_p(), c_void_p(), stream()\n"
        "ok('aclrtGetCurrentContext', byref(ours))\n"
        "with captured(queue) as graph: pass\n"
        "ok('aclrtCreateContext', byref(other), 0)\n"
        "theirs = stream()\n"
        "assert execute(graph.handle, theirs) == OTHER_CONTEXTS_GRAPH\n"
        "ok('aclrtSetCurrentContext', ours)\n"
        f"assert execute(graph.handle, theirs) == {OTHER_CONTEXT}\n"
        "assert execute(graph.handle, queue) == 0\n"
        "ok('aclrtSynchronizeStream', queue)\n"
    )
    assert result.returncode == 0, result.stderr


def test_one_graph_on_two_streams_at_once_fails_on_the_second(
    memory: Mapped, queue: int, other: int
) -> None:
    calls: list[int] = []
    started, release = threading.Event(), threading.Event()

    def block(_: object) -> None:
        calls.append(1)
        started.set()
        release.wait()

    function = HostFunction(block)
    with captured(queue) as graph:
        ok("aclrtLaunchHostFunc", queue, function, None)
        assert fill(memory.address, 7, queue) == SUCCESS
    assert fill(memory.address, 3, other) == SUCCESS
    try:
        assert execute(graph.handle, queue) == SUCCESS
        wait_for(started.is_set, "the graph to start")
        assert execute(graph.handle, other) == SUCCESS, "the host cannot know"
        assert call("aclrtSynchronizeStream", other) == GRAPH_BUSY
        assert bytes_at(memory.address, HUGE) == b"\x03" * HUGE, "it does nothing"
    finally:
        release.set()
    ok("aclrtSynchronizeStream", queue)
    assert execute(graph.handle, other) == SUCCESS, "one after the other is fine"
    ok("aclrtSynchronizeStream", other)
    assert len(calls) == 2
    destroy(graph.handle)


def test_executions_of_several_threads_do_not_mix(memory: Mapped, queue: int) -> None:
    """A stream runs one graph after the other, whichever threads submit them."""
    with captured(queue) as graph:
        for value in range(8):
            assert fill(memory.address, value, queue, 64) == SUCCESS

    def use() -> None:
        for _ in range(200):
            assert execute(graph.handle, queue) == SUCCESS

    threads = [threading.Thread(target=in_a_thread, args=(use,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ok("aclrtSynchronizeStream", queue)
    assert bytes_at(memory.address, 64) == b"\x07" * 64
    destroy(graph.handle)


def test_a_graph_that_executes_is_not_destroyed(queue: int) -> None:
    with captured(queue) as graph:
        pass
    with held(queue):
        assert execute(graph.handle, queue) == SUCCESS
        assert call("aclmdlRIDestroy", graph.handle) == GRAPH_EXECUTED, "after ten seconds"
    ok("aclrtSynchronizeStream", queue)
    destroy(graph.handle)


def test_a_graph_needs_its_memory_where_it_was() -> None:
    """A graph stays valid if memory is mapped again at its address, so memory may sleep."""
    script = (
        "from helpers.captures import *\n"
        "queue, block = stream(), mapped()\n"
        "size = c_size_t(HUGE)\n"
        "with captured(queue) as graph:\n"
        "    ok('aclrtMemsetAsync', block.address, size, 7, size, queue)\n"
        "ok('aclrtUnmapMem', block.address)\n"
        "{}"
        "print('executing', flush=True)\n"
        "ok('aclmdlRIExecuteAsync', graph.handle, queue)\n"
        "ok('aclrtSynchronizeStream', queue)\n"
        "assert bytes_at(block.address, HUGE) == bytes([7]) * HUGE\n"
    )
    gone = run_python(script.format(""))
    assert gone.stdout == "executing\n"
    assert gone.returncode < 0
    assert "device fault: aclrtMemsetAsync in a graph" in gone.stderr
    assert "is no mapped device memory any more" in gone.stderr
    back = run_python(script.format("assert map_mem(block.address, HUGE, block.handle) == 0\n"))
    assert back.returncode == 0, back.stderr


def test_memory_of_a_graph_in_flight_is_not_taken() -> None:
    result = run_python(
        "from helpers.captures import *\n"
        "queue, block = stream(), mapped()\n"
        "size = c_size_t(HUGE)\n"
        "with captured(queue) as graph:\n"
        "    ok('aclrtMemsetAsync', block.address, size, 7, size, queue)\n"
        "with held(queue):\n"
        "    ok('aclmdlRIExecuteAsync', graph.handle, queue)\n"
        "    call('aclrtUnmapMem', block.address)\n"
    )
    assert "device fault" in result.stderr
    assert "work of stream" in result.stderr


def test_a_graph_needs_its_host_memory() -> None:
    result = run_python(
        "from helpers.captures import *\n"
        "queue, block, host = stream(), mapped(), malloc_host(HUGE)\n"
        "with captured(queue) as graph:\n"
        "    assert memcpy_async(block.address, host, HUGE, HOST_TO_DEVICE, queue) == 0\n"
        "ok('aclrtFreeHost', host)\n"
        "ok('aclmdlRIExecuteAsync', graph.handle, queue)\n"
    )
    assert "is no page-locked memory any more" in result.stderr


def test_task_groups_take_kernels_alone(memory: Mapped, queue: int) -> None:
    assert begin_group(None) == INVALID_PARAM
    assert begin_group(queue) == NOT_CAPTURED
    assert begin(queue) == SUCCESS
    assert end_group(queue)[0] == GROUP_STATUS
    assert begin_group(queue) == SUCCESS
    assert begin_group(queue) == GROUP_STATUS
    code, empty = end_group(queue)
    assert code == SUCCESS and empty
    assert begin_group(queue) == SUCCESS
    assert fill(memory.address, 1, queue) == NO_KERNEL
    assert end_group(queue) == (NO_KERNEL, 0)
    assert end(queue) == (SPOILED, 0)


def test_a_group_that_is_not_ended_fails_the_capture(queue: int) -> None:
    assert begin(queue) == SUCCESS
    graph = info(queue)[1]
    assert begin_group(queue) == SUCCESS
    assert end(queue) == (GROUP_STATUS, 0)
    assert call("aclmdlRIDestroy", graph) == HANDLE


def test_what_an_update_refuses(memory: Mapped, queue: int, other: int) -> None:
    update_begin, update_end = "aclmdlRICaptureTaskUpdateBegin", "aclmdlRICaptureTaskUpdateEnd"
    with captured(queue) as graph:
        assert begin_group(queue) == SUCCESS
        group = end_group(queue)[1]
        assert call(update_begin, queue, group) == STREAM_CAPTURED
    assert call(update_begin, None, group) == call(update_begin, other, None) == INVALID_PARAM
    assert call(update_end, other) == GROUP_STATUS
    ok(update_begin, other, group)
    assert call(update_begin, other, group) == GROUP_STATUS
    assert call(update_begin, queue, group) == GROUP_STATUS, "one stream at a time"
    assert fill(memory.address, 1, other) == NO_KERNEL
    assert execute(graph.handle, other) == NO_KERNEL
    ok(update_end, other)
    assert fill(memory.address, 1, other) == SUCCESS
    destroy(graph.handle)


def test_groups_of_destroyed_graphs_are_not_noticed_by_cann() -> None:
    result = run_python(
        "from helpers.captures import *\n"
        "queue = stream()\n"
        "with captured(queue) as graph:\n"
        "    begin_group(queue)\n"
        "    group = end_group(queue)[1]\n"
        "destroy(graph.handle)\n"
        "call('aclmdlRICaptureTaskUpdateBegin', queue, group)\n"
    )
    assert "is not a task group of a captured graph" in result.stderr


def test_graphs_are_described(memory: Mapped, queue: int, tmp_path: Path) -> None:
    with captured(queue) as graph:
        assert fill(memory.address, 1, queue) == SUCCESS
        assert memcpy_async(memory.address + HALF, memory.address, 8, 3, queue) == SUCCESS
    path = tmp_path / "graph.json"
    ok("aclmdlRIDebugPrint", graph.handle)
    ok("aclmdlRIDebugJsonPrint", graph.handle, str(path).encode(), 1)
    tasks = json.loads(path.read_text())
    assert [task["name"] for task in tasks] == ["aclrtMemsetAsync", "aclrtMemcpyAsync"]
    nowhere = str(tmp_path / "none" / "graph.json").encode()
    assert call("aclmdlRIDebugJsonPrint", graph.handle, nowhere, 0) == RT_PARAM
    assert call("aclmdlRIDebugJsonPrint", graph.handle, None, 0) == INVALID_PARAM
    assert call("aclmdlRIDebugPrint", None) == INVALID_PARAM
    destroy(graph.handle)
    assert call("aclmdlRIDebugPrint", graph.handle) == HANDLE


def test_graphs_keep_a_stream_for_each_that_they_capture(queue: int, other: int) -> None:
    left = streams_left()
    with captured(queue) as first, captured(other) as second:
        assert streams_left() == left - 2
    destroy(first.handle)
    assert streams_left() == left - 1
    destroy(second.handle)
    assert streams_left() == left


def test_each_call_can_fail(queue: int) -> None:
    with captured(queue) as graph:
        pass
    control.set_faults("aclmdlRIExecuteAsync:1:507899,aclmdlRIDestroy:1:507899")
    assert execute(graph.handle, queue) == 507899
    assert execute(graph.handle, queue) == SUCCESS
    ok("aclrtSynchronizeStream", queue)
    assert call("aclmdlRIDestroy", graph.handle) == 507899
    destroy(graph.handle)
