# SPDX-License-Identifier: Apache-2.0
"""Contexts, streams and events."""

import resource
import threading
import time
from collections.abc import Iterator
from ctypes import byref, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path

import pytest
from helpers.ascendcl import (
    DEVICE_ID,
    HANDLE,
    NO_CONTEXT,
    NO_TIMESTAMP,
    OTHER_CONTEXT,
    RT_PARAM,
    SUCCESS,
    SYNC_TIMEOUT,
    HostFunction,
    call,
    elapsed_ms,
    event,
    held,
    ok,
    run_python,
    stream,
    stream_is_idle,
)

from vllm_sleep_ascend.sim import control


class Recorder:
    """Functions for streams that record when they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self._kept: list[HostFunction] = []

    def launch(self, queue: int | None, name: str, seconds: float = 0) -> None:
        def run(_: object) -> None:
            time.sleep(seconds)
            self.ran.append(name)

        self._kept.append(HostFunction(run))
        ok("aclrtLaunchHostFunc", queue, self._kept[-1], None)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def queues() -> Iterator[tuple[int, int]]:
    pair = (stream(), stream())
    yield pair
    for queue in pair:
        ok("aclrtDestroyStream", queue)


# Contexts are tested in separate processes, because torch configures a default device in this one.

IN_A_THREAD = """
import threading
codes = []
def work():
    codes.append(call('aclrtGetDevice', byref(c_int32())))
    codes.append(malloc(HUGE)[0])
    codes.append(malloc_physical(HUGE)[0])
    codes.append(call('aclrtReserveMemAddress', byref(c_void_p()), c_size_t(HUGE)))
    codes.append(call('aclrtSynchronizeDevice'))
    codes.append(call('aclrtSynchronizeStream', None))
    codes.append(call('aclrtMallocHost', byref(c_void_p()), c_size_t(HUGE)))
    usage = ctypes.create_string_buffer(256)
    codes.append(call('aclrtGetMemUsageInfo', 0, usage, c_size_t(1), byref(c_size_t())))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*codes)
"""


def test_a_thread_without_a_context() -> None:
    result = run_python(IN_A_THREAD)
    assert result.stdout.split() == [str(NO_CONTEXT)] * 8, result.stderr


def test_a_default_device_is_every_threads(tmp_path: Path) -> None:
    configuration = tmp_path / "acl.json"
    configuration.write_text('{"defaultDevice": {"default_device": "1"}}')
    code = (
        f"ok('aclInit', b'{configuration}')\n"
        "import threading\n"
        "index = c_int32(-1)\n"
        "def ask():\n"
        "    print(call('aclrtGetCurrentContext', byref(c_void_p())))\n"
        "    ok('aclrtGetDevice', byref(index))\n"
        "thread = threading.Thread(target=ask)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print(index.value)\n"
    )
    result = run_python(code)
    assert result.stdout == "107002\n1\n", result.stderr


def test_devices() -> None:
    assert call("aclrtSetDevice", 2) == DEVICE_ID
    assert call("aclrtSetDevice", -1) == DEVICE_ID
    count, index = c_uint32(), c_int32()
    ok("aclrtGetDeviceCount", byref(count))
    assert count.value == 2
    ok("aclrtSetDevice", 1)
    ok("aclrtGetDevice", byref(index))
    assert index.value == 1


def test_threads_share_the_default_context(queues: tuple[int, int]) -> None:
    codes: list[int] = []

    def use() -> None:
        codes.append(call("aclrtSetDevice", 0))
        codes.append(call("aclrtSynchronizeStream", queues[0]))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert codes == [SUCCESS, SUCCESS]


ANOTHER_CONTEXT = f"""
ours, other, queue, mark = c_void_p(), c_void_p(), stream(), event()
ok('aclrtGetCurrentContext', byref(ours))
ok('aclrtCreateContext', byref(other), 0)
assert call('aclrtSynchronizeStream', queue) == {OTHER_CONTEXT}
assert call('aclrtRecordEvent', mark, queue) == {OTHER_CONTEXT}
assert call('aclrtStreamWaitEvent', queue, mark) == {OTHER_CONTEXT}
assert memcpy_async(1 << 40, 1 << 40, 1, HOST_TO_DEVICE, queue) == {OTHER_CONTEXT}
assert call('aclrtDestroyStream', queue) == {OTHER_CONTEXT}
theirs = stream()
ok('aclrtSetCurrentContext', ours)
assert call('aclrtSynchronizeStream', theirs) == {OTHER_CONTEXT}
assert call('aclrtDestroyStream', theirs) == {OTHER_CONTEXT}
assert call('aclrtDestroyContext', ours) == {NO_CONTEXT}, 'the default context'
ok('aclrtSetCurrentContext', other)
ok('aclrtDestroyContext', other)
assert call('aclrtSynchronizeStream', None) == {NO_CONTEXT}, 'the context is gone'
assert call('aclrtSetCurrentContext', other) == {RT_PARAM}
assert call('aclrtDestroyContext', other) == {NO_CONTEXT}, 'it is destroyed already'
ok('aclrtSetCurrentContext', ours)
assert call('aclrtSynchronizeStream', theirs) == {HANDLE}, 'and its streams'
"""


def test_another_context() -> None:
    result = run_python(ANOTHER_CONTEXT)
    assert result.returncode == 0, result.stderr


def test_work_of_one_stream_runs_in_order(queues: tuple[int, int], recorder: Recorder) -> None:
    for i in range(50):
        recorder.launch(queues[0], str(i), 0.001 if i % 10 == 0 else 0)
    ok("aclrtSynchronizeStream", queues[0])
    assert recorder.ran == [str(i) for i in range(50)]


def test_launching_does_not_wait(queues: tuple[int, int], recorder: Recorder) -> None:
    with held(queues[0]):
        recorder.launch(queues[0], "slow")
        assert not stream_is_idle(queues[0])
        assert stream_is_idle(queues[1])
        ok("aclrtSynchronizeStream", queues[1])
        assert recorder.ran == [], "another stream is not waited for"
    ok("aclrtSynchronizeStream", queues[0])
    assert recorder.ran == ["slow"]


def test_the_device_waits_for_all_streams(queues: tuple[int, int], recorder: Recorder) -> None:
    for i, queue in enumerate((None, *queues)):
        recorder.launch(queue, str(i), 0.05)
    ok("aclrtSynchronizeDevice")
    assert sorted(recorder.ran) == ["0", "1", "2"]


def test_of_another_context_it_waits_for_none() -> None:
    result = run_python(
        "ours, other = c_void_p(), c_void_p()\n"
        "ok('aclrtGetCurrentContext', byref(ours))\n"
        "ok('aclrtCreateContext', byref(other), 0)\n"
        "with held(stream()):\n"
        "    ok('aclrtSetCurrentContext', ours)\n"
        "    ok('aclrtSynchronizeDevice')\n"
        "    ok('aclrtSetCurrentContext', other)\n"
        f"    assert call('aclrtSynchronizeDeviceWithTimeout', 20) == {SYNC_TIMEOUT}\n"
        "ok('aclrtSynchronizeDevice')\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("flags", "is_waited_for"), [(0, True), (1 | 2 | 8, True), (4, False), (16, False), (32, False)]
)
def test_streams_that_are_not_waited_for(flags: int, is_waited_for: bool) -> None:
    queue = c_void_p()
    ok("aclrtCreateStreamWithConfig", byref(queue), c_uint32(0), c_uint32(flags))
    expected = SYNC_TIMEOUT if is_waited_for else SUCCESS
    with held(queue.value or 0):
        assert stream_is_idle(queue.value or 0) != is_waited_for, "whatever runs on it"
        assert call("aclrtSynchronizeDeviceWithTimeout", 20) == expected
        assert call("aclrtSynchronizeStreamWithTimeout", queue, 20) == expected
    ok("aclrtDestroyStream", queue)


def test_timeouts(queues: tuple[int, int], recorder: Recorder) -> None:
    mark = event()
    with held(queues[0]):
        recorder.launch(queues[0], "work", 0.1)
        ok("aclrtRecordEvent", mark, queues[0])
        assert call("aclrtSynchronizeStreamWithTimeout", queues[0], 20) == SYNC_TIMEOUT
        assert call("aclrtSynchronizeDeviceWithTimeout", 20) == SYNC_TIMEOUT
        assert call("aclrtSynchronizeEventWithTimeout", mark, 20) == SYNC_TIMEOUT + 1
        for timeout in (0, -2):
            assert call("aclrtSynchronizeStreamWithTimeout", queues[0], timeout) == RT_PARAM
            assert call("aclrtSynchronizeDeviceWithTimeout", timeout) == RT_PARAM
            assert call("aclrtSynchronizeEventWithTimeout", mark, timeout) == RT_PARAM
        assert recorder.ran == []
    assert call("aclrtSynchronizeStreamWithTimeout", queues[0], -1) == SUCCESS
    assert recorder.ran == ["work"]
    ok("aclrtDestroyEvent", mark)


def test_a_stream_waits_for_an_event(queues: tuple[int, int], recorder: Recorder) -> None:
    mark = event()
    with held(queues[0]) as begin:
        recorder.launch(queues[0], "first")
        ok("aclrtRecordEvent", mark, queues[0])
        with held(queues[0]):
            recorder.launch(queues[0], "after the event")
            ok("aclrtStreamWaitEvent", queues[1], mark)
            recorder.launch(queues[1], "second")
            ok("aclrtDestroyEvent", mark)  # streams that wait for it continue to wait
            assert call("aclrtSynchronizeStreamWithTimeout", queues[1], 100) == SYNC_TIMEOUT
            assert recorder.ran == []
            begin.set()
            assert call("aclrtSynchronizeStreamWithTimeout", queues[1], 20000) == SUCCESS
            assert recorder.ran == ["first", "second"]
    ok("aclrtSynchronizeStream", queues[0])
    assert recorder.ran == ["first", "second", "after the event"]


def test_an_event_is_what_was_recorded_last(queues: tuple[int, int], recorder: Recorder) -> None:
    mark = event()
    with held(queues[0]):
        recorder.launch(queues[0], "slow")
        ok("aclrtRecordEvent", mark, queues[0])
        ok("aclrtRecordEvent", mark, queues[1])
        assert call("aclrtSynchronizeEventWithTimeout", mark, 20000) == SUCCESS
        assert recorder.ran == []
    ok("aclrtSynchronizeStream", queues[0])
    ok("aclrtDestroyEvent", mark)


def test_querying_an_event(queues: tuple[int, int], recorder: Recorder) -> None:
    mark, status = event(), c_int32(-1)
    with held(queues[0]):
        recorder.launch(queues[0], "slow", 0.1)
        ok("aclrtRecordEvent", mark, queues[0])
        ok("aclrtQueryEventStatus", mark, byref(status))
        assert status.value == 0, "not ready"
    ok("aclrtSynchronizeEvent", mark)
    assert recorder.ran == ["slow"]
    ok("aclrtQueryEventStatus", mark, byref(status))
    assert status.value == 1, "complete"
    ok("aclrtDestroyEvent", mark)


def test_elapsed_time(queues: tuple[int, int], recorder: Recorder) -> None:
    start, end, untimed = event(), event(), event(flags=1)
    began = time.monotonic()
    assert elapsed_ms(start, end)[0] == NO_TIMESTAMP, "not recorded"
    ok("aclrtRecordEvent", start, queues[0])
    recorder.launch(queues[0], "slow", 0.1)
    ok("aclrtRecordEvent", end, queues[0])
    ok("aclrtRecordEvent", untimed, queues[0])
    ok("aclrtSynchronizeStream", queues[0])
    code, milliseconds = elapsed_ms(start, end)
    assert code == SUCCESS
    assert 90 < milliseconds <= 1000 * (time.monotonic() - began)
    assert elapsed_ms(start, untimed)[0] == NO_TIMESTAMP
    for mark in (start, end, untimed):
        ok("aclrtDestroyEvent", mark)


def test_destroyed_handles_are_unknown() -> None:
    queue, mark = stream(), event()
    ok("aclrtDestroyStream", queue)
    ok("aclrtDestroyEvent", mark)
    assert call("aclrtSynchronizeStream", queue) == HANDLE
    assert call("aclrtDestroyStream", queue) == HANDLE
    assert call("aclrtRecordEvent", mark, None) == HANDLE
    assert call("aclrtDestroyEvent", mark) == HANDLE
    assert call("aclrtSynchronizeStream", mark) == HANDLE, "a handle of another kind"


def test_destroying_a_stream_finishes_its_work(recorder: Recorder) -> None:
    queue = stream()
    recorder.launch(queue, "work", 0.1)
    ok("aclrtDestroyStream", queue)
    assert recorder.ran == ["work"]


def test_idle_streams_cost_no_threads(recorder: Recorder) -> None:
    before = count_threads()
    streams = control.counters().streams
    queues = [stream() for _ in range(300)]
    assert control.counters().streams == streams + 300
    assert count_threads() <= before  # threads of earlier tests' streams may end meanwhile
    for queue in queues:
        ok("aclrtDestroyStream", queue)


def count_threads() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


def test_synchronising_an_idle_stream_is_cheap(queues: tuple[int, int]) -> None:
    handle = c_void_p(queues[0])
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    for _ in range(10000):
        call("aclrtSynchronizeStream", handle)
    waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
    assert waits < 100, "it waits for another thread"


def test_initialising_twice_is_refused() -> None:
    first = call("aclInit", None)
    assert first in (SUCCESS, 100002)
    assert call("aclInit", None) == 100002


def test_callbacks(queues: tuple[int, int], recorder: Recorder) -> None:
    function = HostFunction(lambda _: recorder.ran.append("callback"))
    ok("aclrtSubscribeReport", c_uint64(1), queues[0])
    ok("aclrtLaunchCallback", function, None, 1, queues[0])
    ok("aclrtProcessReport", 10)
    ok("aclrtSynchronizeStream", queues[0])
    assert recorder.ran == ["callback"]
    ok("aclrtUnSubscribeReport", c_uint64(1), queues[0])
