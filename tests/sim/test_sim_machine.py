# SPDX-License-Identifier: Apache-2.0
"""What the processes of a simulated machine share, and how a process ends."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from helpers.ascendcl import (
    GIB,
    KIB,
    MIB,
    NO_DEVICE,
    NO_RESOURCE,
    NOT_SET,
    OUT_OF_MEMORY,
    UNSUPPORTED,
    call,
    free_and_total,
    malloc,
    malloc_physical,
    ok,
    run_python,
)


class Neighbour:
    """Another process of the machine, which allocates memory and then waits."""

    def __init__(self, code: str, **environment: str) -> None:
        setup = "from helpers.ascendcl import *\nimport sys\nok('aclrtSetDevice', 0)\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{setup}{code}\nprint('ready', flush=True)\nsys.stdin.read()"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self) -> "Neighbour":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_processes_see_each_other() -> None:
    with Neighbour("malloc(64 * MIB); physical(64 * MIB)"):
        assert free_and_total() == (GIB - 128 * MIB, GIB)
        assert malloc_physical(GIB - 126 * MIB)[0] == OUT_OF_MEMORY
    assert free_and_total() == (GIB, GIB)


def test_a_killed_process_gives_everything_back_even_as_a_zombie() -> None:
    with Neighbour("malloc(64 * MIB); mapped(64 * MIB)") as neighbour:
        assert free_and_total()[0] == GIB - 128 * MIB
        neighbour.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, neighbour.process.pid, os.WEXITED | os.WNOWAIT)
        assert free_and_total()[0] == GIB
        code, pointer = malloc(GIB)
        assert code == 0
        ok("aclrtFree", pointer)


def test_many_processes_never_take_more_than_there_is() -> None:
    unit = 512 * KIB
    code = (
        "import time\n"
        "print('ready', flush=True)\n"
        "time.sleep(max(0, float(sys.stdin.readline()) - time.time()))\n"
        "count = 0\n"
        f"while malloc({unit})[0] == SUCCESS: count += 1\n"
        "print(count, flush=True)"
    )

    def race() -> list[int]:
        with ExitStack() as stack:
            others = [stack.enter_context(Neighbour(code)).process for _ in range(4)]
            start = time.time() + 1
            for other in others:
                assert other.stdin is not None
                other.stdin.write(f"{start}\n")
                other.stdin.flush()
            counts = [int(other.stdout.readline()) for other in others if other.stdout]
            assert sum(counts) == GIB // unit
            assert free_and_total()[0] == 0
        assert free_and_total()[0] == GIB
        return sorted(counts)

    # At least two at once, which a busy machine may prevent now and then.
    assert any(race()[-2] > 0 for _ in range(10))


MACHINE_WITH_FIVE_STREAMS = {
    "NPU_SIM_MACHINE": f"five-streams-{os.getpid()}",
    "NPU_SIM_STREAMS": "5",
}


def test_a_device_has_so_many_streams() -> None:
    usual = {**MACHINE_WITH_FIVE_STREAMS, "NPU_SIM_STREAMS": ""}
    assert run_python("print(streams_left())", **usual).stdout == "1983\n", "and a default stream"
    result = run_python(
        "queues = [stream() for _ in range(streams_left())]\n"
        "assert len(queues) == 4\n"
        f"assert call('aclrtCreateStream', byref(c_void_p())) == {NO_RESOURCE}\n"
        "assert 'Alloc sq cq fail' in message()\n"
        f"assert call('aclrtCreateContext', byref(c_void_p()), 0) == {NO_RESOURCE}\n"
        "ok('aclrtDestroyStream', queues.pop())\n"
        "assert streams_left() == 1\n"
        "queues.append(stream())\n"
        "ok('aclrtSetDevice', 1)\n"
        "assert streams_left() == 4, 'of another device'\n"
        "ok('aclrtResetDevice', 0)\n"
        "ok('aclrtSetDevice', 0)\n"
        "assert streams_left() == 4, 'a device that is reset gives all back'\n",
        **MACHINE_WITH_FIVE_STREAMS,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("chip", "name", "streams", "taken"),
    [
        ("", "Ascend910B2", 1984, 1),
        ("910_93", "Ascend910_9391", 1984, 1),
        ("310P", "Ascend310P3", 1024, 2),
    ],
)
def test_chips(chip: str, name: str, streams: int, taken: int) -> None:
    code = (
        "library.aclrtGetSocName.restype = c_char_p\n"
        "print(library.aclrtGetSocName().decode(), streams_left())\n"
        "ok('aclrtCreateContext', byref(c_void_p()), 0)\n"
        "print(streams_left())"
    )
    machine = {"NPU_SIM_SOC": chip, "NPU_SIM_MACHINE": f"chip-{os.getpid()}"}
    left = streams - taken
    assert run_python(code, **machine).stdout == f"{name} {left}\n{left - taken}\n"


def test_a_device_has_a_stream_of_its_own_whatever_context_comes_first() -> None:
    result = run_python(
        "ok('aclrtResetDevice', 0)\n"
        f"assert call('aclrtResetDevice', 0) == {NOT_SET}\n"
        "context = c_void_p()\n"
        "ok('aclrtCreateContext', byref(context), 0)\n"
        "print(streams_left(), 'beside the stream of the device and that of the context')\n"
        "ok('aclrtSetDevice', 0)\n"
        "print(streams_left(), 'which the default context takes over')\n"
        "ok('aclrtDestroyContext', context)\n"
        "print(streams_left())\n"
        "ok('aclrtResetDevice', 0)\n"
        "ok('aclrtSetDevice', 0)\n"
        "print(streams_left())\n",
        **MACHINE_WITH_FIVE_STREAMS,
    )
    assert [line[0] for line in result.stdout.splitlines()] == ["3", "3", "4", "4"], result.stderr


def test_a_chip_that_is_not_known_is_refused() -> None:
    assert "NPU_SIM_SOC names no chip: '910D'" in run_python("", NPU_SIM_SOC="910D").stderr


@pytest.mark.parametrize(
    "name",
    [
        "aclrtHostGetDevicePointer",
        "aclrtHostRegister",
        "aclrtHostRegisterV2",
        "aclrtHostUnregister",
        "aclrtMemcpyBatch",
        "aclrtMemcpyBatchAsync",
    ],
)
def test_a_310p_refuses_what_its_runtime_does_not_support(name: str) -> None:
    code = f"print(call('{name}')); print(message())"
    done = run_python(code, NPU_SIM_SOC="310P", NPU_SIM_MACHINE=f"310p-{os.getpid()}")
    said = f"{UNSUPPORTED}\n{name}: Ascend310P3 does not support it [{UNSUPPORTED}]\n"
    assert done.stdout == said, done.stderr


def test_processes_share_them_and_a_killed_one_gives_them_back() -> None:
    def left() -> str:
        return run_python("print(streams_left())", **MACHINE_WITH_FIVE_STREAMS).stdout

    with Neighbour("queues = [stream(), stream()]", **MACHINE_WITH_FIVE_STREAMS) as neighbour:
        assert left() == "1\n"
        with Neighbour("queue = stream()", **MACHINE_WITH_FIVE_STREAMS):
            result = run_python("", **MACHINE_WITH_FIVE_STREAMS)
            assert f"aclrtSetDevice: {NO_RESOURCE}" in result.stderr
        neighbour.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, neighbour.process.pid, os.WEXITED | os.WNOWAIT)
        assert left() == "4\n"


def test_machines_with_other_names_are_other_machines() -> None:
    with Neighbour("malloc(64 * MIB)", NPU_SIM_MACHINE=f"other-{os.getpid()}"):
        assert free_and_total()[0] == GIB


def test_devices_have_memory_of_their_own() -> None:
    with Neighbour("ok('aclrtSetDevice', 1); malloc(64 * MIB)"):
        assert free_and_total()[0] == GIB
        ok("aclrtSetDevice", 1)
        assert free_and_total()[0] == GIB - 64 * MIB
        ok("aclrtSetDevice", 0)


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0", 1), ("1", 1), ("0,1", 2), ("0,5,1", 1), ("0,1,2", 2), ("1,x", 1)]
    + [(none, 0) for none in ("", "x", "5", "1,0", "0,0")],
)
def test_visible_devices(visible: str, count: int) -> None:
    code = (
        "from helpers.ascendcl import *\ncount = c_uint32()\n"
        "print(call('aclrtGetDeviceCount', byref(count)), count.value)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ASCEND_RT_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
    )
    expected = 0 if count else NO_DEVICE
    assert result.stdout == f"{expected} {count}\n", result.stderr


def test_visible_devices_are_renumbered() -> None:
    with Neighbour("malloc(64 * MIB)", ASCEND_RT_VISIBLE_DEVICES="1"):
        assert free_and_total()[0] == GIB
        ok("aclrtSetDevice", 1)
        assert free_and_total()[0] == GIB - 64 * MIB
        ok("aclrtSetDevice", 0)


def test_a_forked_child_is_refused_and_harms_nothing() -> None:
    code, pointer = malloc(64 * MIB)
    assert code == 0
    child = os.fork()
    if child == 0:
        refused = malloc(MIB)[0], call("aclrtSetDevice", 0), call("aclrtFree", pointer)
        os._exit(0 if refused == (500000, 500000, 500000) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert free_and_total()[0] == GIB - 64 * MIB
    ok("aclrtFree", pointer)


def test_a_fork_before_the_first_use_is_a_process_like_any_other() -> None:
    code = (
        "import os\nfrom helpers.ascendcl import *\n"
        "child = os.fork()\n"
        "ok('aclrtSetDevice', 0)\n"
        "assert malloc(MIB)[0] == 0\n"
        "if child: assert os.waitpid(child, 0)[1] == 0"
    )
    environment = dict(os.environ)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr


WORK_IN_FLIGHT = """
queue = stream()
host, (_, address) = malloc_host(64 * MIB), malloc(64 * MIB)
for _ in range(50):
    memcpy_async(address, host, 64 * MIB, HOST_TO_DEVICE, queue)
"""


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "call('aclFinalize')"])
def test_exit_with_work_in_flight_is_quick_and_silent(ending: str) -> None:
    result = run_python(WORK_IN_FLIGHT + ending)
    assert result.returncode == (3 if "exit" in ending else 0)
    assert result.stdout == result.stderr == ""
    assert free_and_total()[0] == GIB


def test_the_link_is_as_slow_as_it_is_set() -> None:
    once = 64 * MIB / 0.2e9
    code = (
        "host, (_, address) = malloc_host(64 * MIB), malloc(64 * MIB)\n"
        "memcpy(address, host, 64 * MIB, HOST_TO_DEVICE)\n"
        "first, second = stream(), stream()\n"
        "other = malloc_host(64 * MIB)\n"
        "ctypes.memset(other, 0, 64 * MIB)\n"
        "def alone():\n"
        "    memcpy(address, host, 64 * MIB, HOST_TO_DEVICE)\n"
        "def shared():\n"
        "    memcpy_async(address, host, 64 * MIB, HOST_TO_DEVICE, first)\n"
        "    memcpy_async(address, host, 64 * MIB, HOST_TO_DEVICE, second)\n"
        "def duplex():\n"
        "    memcpy_async(address, host, 64 * MIB, HOST_TO_DEVICE, first)\n"
        "    memcpy_async(other, address, 64 * MIB, DEVICE_TO_HOST, second)\n"
        "def fastest(copies, goal):\n"
        "    best = 60.0\n"
        "    for _ in range(30):\n"
        "        started = time.monotonic()\n"
        "        copies()\n"
        "        ok('aclrtSynchronizeDevice')\n"
        "        best = min(best, time.monotonic() - started)\n"
        "        if best < goal: break\n"
        "    return best\n"
        f"once = {once}\n"
        "print(fastest(alone, 1.4 * once))\n"
        "print(fastest(duplex, 1.4 * once))\n"
        "print(fastest(shared, 2.4 * once))\n"
    )
    result = run_python(code, timeout=120, NPU_SIM_LINK_GBPS="0.2")
    assert result.returncode == 0, result.stderr
    alone, duplex, shared = map(float, result.stdout.split())
    # None is faster than the link. A busy machine may delay most of them, but not all.
    assert 0.95 * once < alone < 1.4 * once
    assert 0.95 * once < duplex < 1.4 * once, "two directions do not share the link"
    assert 1.95 * once < shared < 2.4 * once, "two copies of one direction do"


def test_processes_share_the_link() -> None:
    rate = {"NPU_SIM_LINK_GBPS": "0.2"}
    buffers = "host, (_, address) = malloc_host(32 * MIB), malloc(32 * MIB)\n"
    copies = (
        "import threading\n"
        "def copy():\n"
        "    ok('aclrtSetDevice', 0)\n"
        "    while True: memcpy(address, host, 4 * MIB, HOST_TO_DEVICE)\n"
        "threading.Thread(target=copy, daemon=True).start()\n"
    )
    timed = (
        "started = time.monotonic()\n"
        "memcpy(address, host, 32 * MIB, HOST_TO_DEVICE)\n"
        "print(time.monotonic() - started)"
    )

    def shares() -> bool:  # on a busy machine, the neighbour copies less
        return float(run_python(buffers + timed, **rate).stdout) > 1.4 * 32 * MIB / 0.2e9

    with Neighbour(buffers + copies, **rate):
        assert any(shares() for _ in range(20))


def test_a_fraction_of_a_gib() -> None:
    result = run_python("print(*free_and_total())", NPU_SIM_HBM_GIB="0.25")
    assert result.stdout.split() == [str(256 * MIB)] * 2


def test_resetting_a_device() -> None:
    result = run_python(
        "ok('aclrtSetDevice', 0)\n"
        "queue = stream()\n"
        "ok('aclrtResetDevice', 0)\n"
        "assert call('aclrtSynchronizeStream', queue) == SUCCESS, 'set twice, reset once'\n"
        "ok('aclrtResetDevice', 0)\n"
        "assert call('aclrtSynchronizeStream', queue) == NO_CONTEXT\n"
        "ok('aclrtSetDevice', 0)\n"
        "assert call('aclrtSynchronizeStream', queue) == HANDLE\n"
    )
    assert result.returncode == 0, result.stderr
