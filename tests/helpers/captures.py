# SPDX-License-Identifier: Apache-2.0
"""Capturing and executing graphs through AscendCL."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_int32, c_void_p
from typing import TypeVar

from .ascendcl import call, ok

OTHER_CONTEXTS_GRAPH = 107004
OTHER_GRAPH = 107024
UNJOINED = 107025
GRAPH_CAPTURED = 107026
STREAM_CAPTURED = 107027
EVENT_CAPTURED = 107028
NOT_CAPTURED = 107029
MODE_FORBIDS = 107030
DEFAULT_STREAM = 107031
TWO_GRAPHS = 107032
GROUP_STATUS = 107033
GROUP_INTERRUPTED = 107034
ANOTHER_BEGAN = 107036
GRAPH_EXECUTED = 107037
WRONG_THREAD = 107038
MODE_FORBIDS_ASYNC = 107041
RT_INTERNAL = 507000
GRAPH_BUSY = 507001
NO_KERNEL = 507009
SPOILED = 507903

GLOBAL, THREAD_LOCAL, RELAXED = range(3)
NONE, ACTIVE, INVALIDATED = range(3)

T = TypeVar("T")


def begin(queue: int | None, mode: int = GLOBAL) -> int:
    return call("aclmdlRICaptureBegin", queue, mode)


def end(queue: int | None) -> tuple[int, int]:
    graph = c_void_p()
    return call("aclmdlRICaptureEnd", queue, byref(graph)), graph.value or 0


def info(queue: int) -> tuple[int, int]:
    status, graph = c_int32(-1), c_void_p()
    ok("aclmdlRICaptureGetInfo", queue, byref(status), byref(graph))
    return status.value, graph.value or 0


def exchange(mode: int) -> int:
    before = c_int32(mode)
    ok("aclmdlRICaptureThreadExchangeMode", byref(before))
    return before.value


def execute(graph: int, queue: int | None) -> int:
    return call("aclmdlRIExecuteAsync", graph, queue)


def destroy(graph: int) -> None:
    ok("aclmdlRIDestroy", graph)


def begin_group(queue: int | None) -> int:
    return call("aclmdlRICaptureTaskGrpBegin", queue)


def end_group(queue: int) -> tuple[int, int]:
    group = c_void_p()
    return call("aclmdlRICaptureTaskGrpEnd", queue, byref(group)), group.value or 0


class Graph:
    """A captured graph. Its handle is set at the end of the block."""

    handle = 0


@contextmanager
def captured(queue: int, mode: int = GLOBAL) -> Iterator[Graph]:
    """Capture the stream's work inside the block."""
    graph = Graph()
    ok("aclmdlRICaptureBegin", queue, mode)
    yield graph
    code, graph.handle = end(queue)
    assert code == 0, code


def in_a_thread(function: Callable[[], T]) -> T:
    results: list[T] = []

    def use() -> None:
        ok("aclrtSetDevice", 0)
        results.append(function())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return results[0]
