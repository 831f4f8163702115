# SPDX-License-Identifier: Apache-2.0
"""Processes with sleeping or waking memory end in every possible way: cleanly, with all device
memory freed and nothing on stderr."""

import os
import re
import signal
import subprocess
import sys

import pytest
from helpers import MIB
from helpers.patience import patience

DEVICE_BYTES = 64 * MIB
HELD = 12 * MIB  # by a child that is awake
ENVIRONMENT = {
    **os.environ,
    "NPU_SIM_MACHINE": f"exit-{os.getpid()}",
    "NPU_SIM_HBM_GIB": str(DEVICE_BYTES / 2**30),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}

START = """
import multiprocessing, os, signal, sys, threading, time
from helpers import allocator
from helpers import MIB
from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.sim import control

allocator.start()
allocator.configure(chunk_mib=2)
weights = [allocator.Block("weights", 4 * MIB, seed) for seed in range(2)]
cache = allocator.Block("kv_cache", 4 * MIB)
sleep_1 = lambda: _camem.sleep(allocator.LEVEL_1)
sleep_2 = lambda: _camem.sleep(allocator.LEVEL_2)
wake = lambda: _camem.wake(list(allocator.TAGS))
say = lambda *words: print(*words, flush=True)

def reach(call, nth=1):
    while control.call_count(call) < nth:
        time.sleep(0.001)

def announce(call, nth):
    "Slow that call down and say when it has begun."
    control.reset_counters()
    control.set_faults(f"{call}:{nth}:delay_ms=60000")
    threading.Thread(target=lambda: (reach(call, nth), say("there")), daemon=True).start()
"""

# Allocates as much device memory as the argument says, in one piece.
TAKE = """
import ctypes, sys
acl = ctypes.CDLL("libascendcl.so")
acl.aclInit(None)
acl.aclrtSetDevice(0)
print(acl.aclrtMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(int(sys.argv[1])), 0))
"""


def start(code: str, prelude: str = START, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = child.communicate(timeout=60 * patience())
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    # torch_npu logs this line if its queue wakes at the exit with nothing to do.
    err = re.sub(r"^I\d{4} .*NPUQueue\.cpp.* taskqueue is empty.*\n", "", err, flags=re.M)
    return child.returncode, out, err


def can_take(size: int) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", TAKE, str(size)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip() == "0"


SLOW = "control.set_faults('aclrtMemcpyAsync:1:delay_ms=400'); control.reset_counters()\n"
SLEEPER = SLOW + (
    "thread = threading.Thread(target=sleep_1, daemon={daemon})\n"
    "thread.start()\n"
    "reach('aclrtMemcpyAsync')\n"
)
# Objects in sys.modules are destroyed late in the interpreter's exit; the sleep ends meanwhile.
LINGER = """
class Linger:
    def __del__(self, sleep=time.sleep):
        sleep(1)
sys.modules["linger"] = Linger()
"""

EXITS = {
    "awake": ("", 0),
    "level 1": ("sleep_1()", 0),
    "level 2": ("sleep_2()", 0),
    "awake again": ("sleep_1(); wake(); assert all(block.intact() for block in weights)", 0),
    "only the kv cache asleep": ("sleep_1(); _camem.wake(['weights', 'runtime'])", 0),
    "all freed while asleep": ("sleep_1(); [block.free() for block in (*weights, cache)]", 0),
    "sys.exit asleep": ("sleep_1(); sys.exit(7)", 7),
    "os._exit awake": ("os._exit(5)", 5),
    "os._exit asleep": ("sleep_1(); os._exit(5)", 5),
    "backups prepared": ("_camem.prepare(['weights'])", 0),
    "freed and asked by an atexit function": (
        "import atexit\n"
        "sleep_1()\n"
        "@atexit.register\n"
        "def late():\n"
        "    weights[0].free()\n"
        "    assert len(_camem.allocations()) == 2\n",
        0,
    ),
    "freed by a finaliser, after atexit": (
        "class Holder:\n"
        "    def __del__(self, free=weights[0].free, count=control.call_count, end=os._exit):\n"
        "        before = count('aclrtReleaseMemAddress')\n"
        "        free()\n"
        "        if count('aclrtReleaseMemAddress') != before:\n"
        "            end(9)\n"
        "sys.modules['holder'] = Holder()\n"
        "sleep_1()\n",
        0,
    ),
    "a thread sleeps": (SLEEPER.format(daemon=False), 0),
    "a daemon thread sleeps": (SLEEPER.format(daemon=True), 0),
    "a daemon thread's sleep ends during the exit": (LINGER + SLEEPER.format(daemon=True), 0),
}


@pytest.mark.parametrize("name", EXITS)
def test_the_interpreter_exits(name):
    code, expected = EXITS[name]
    assert finish(start(code)) == (expected, "", "")
    assert can_take(DEVICE_BYTES)


TORCH = """
import torch, torch_npu
from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.memory import pool
with pool.use_pool("weights"):
    weights = torch.ones(4 << 20, dtype=torch.uint8, device="npu")
with pool.use_pool("kv_cache"):
    cache = torch.zeros(4 << 20, dtype=torch.uint8, device="npu")
torch.npu.synchronize()
PLAN = {"weights": "offload", "kv_cache": "discard"}
"""
TORCH_EXITS = {
    "pools alive": "",
    "pools alive and asleep": "_camem.sleep(PLAN)",
    "pools released asleep": "_camem.sleep(PLAN); del weights, cache; pool.release_pools()",
    # Like an engine's worker: it owns tensors and wakes nothing when it is destroyed.
    "a holder that is asleep": (
        "class Worker:\n"
        "    def __init__(self, *tensors):\n"
        "        self.tensors, self.self = tensors, self\n"
        "    def __del__(self, release=pool.release_pools):\n"
        "        self.tensors = ()\n"
        "        release()\n"
        "worker = Worker(weights, cache)\n"
        "del weights, cache\n"
        "_camem.sleep(PLAN)\n"
    ),
}


@pytest.mark.parametrize("name", TORCH_EXITS)
def test_the_interpreter_exits_with_tensors(name):
    # torch_npu warns about its alignment at the first use.
    child = start(
        TORCH_EXITS[name],
        prelude=TORCH,
        TORCH_DEVICE_BACKEND_AUTOLOAD="1",
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    assert finish(child) == (0, "", "")
    assert can_take(DEVICE_BYTES)


IN_THE_CHILD = """
def in_the_child():
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the hook says why it refuses
    assert allocator._hooks.camem_malloc(2 * MIB, 0, None) is None
    for block in (*weights, cache):
        block.free()
    for refused in (sleep_1, wake, _camem.allocations, lambda: allocator.configure(chunk_mib=2)):
        try:
            refused()
        except RuntimeError as error:
            assert "forked" in str(error)
        else:
            os._exit(9)

def os_fork():
    child = os.fork()
    if child == 0:
        in_the_child()
        sys.exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def multiprocessing_fork():
    child = multiprocessing.get_context("fork").Process(target=in_the_child)
    child.start()
    child.join()
    return child.exitcode + 3
"""


@pytest.mark.parametrize("fork", ["os_fork", "multiprocessing_fork"])
@pytest.mark.parametrize(
    "state",
    ["", "sleep_1()", "sleep_2()", "_camem.prepare(['weights']); _camem.wait_prepared(9.0)"],
    ids=["awake", "level 1", "level 2", "prepared"],
)
def test_a_forked_child_changes_nothing(fork, state):
    code = IN_THE_CHILD + (
        f"{state}\n"
        "before = control.counters(), _camem.allocations()\n"
        f"assert {fork}() == 3\n"
        "assert (control.counters(), _camem.allocations()) == before\n"
        "wake()\n"
        f"assert {state == 'sleep_2()'} or all(block.intact() for block in weights)\n"
        "sleep_1(); wake()\n"
        "say(control.counters().device_bytes)\n"
    )
    assert finish(start(code)) == (0, f"{HELD}\n", "")
    assert can_take(DEVICE_BYTES)


@pytest.mark.parametrize(
    "busy",
    [
        SLEEPER.format(daemon=False),
        "control.set_faults('aclrtMallocHost:1:delay_ms=400:*')\n_camem.prepare(['weights'])\n",
    ],
    ids=["sleeping", "preparing"],
)
def test_a_fork_while_other_threads_work_does_not_hang(busy):
    code = (
        IN_THE_CHILD
        + busy
        + (
            "assert os_fork() == 3\n"
            "sleep_1()\n"
            "wake()\n"
            "assert all(block.intact() for block in weights)\n"
        )
    )
    assert finish(start(code)) == (0, "", "")


BUSY = {
    "sleep": "announce('aclrtMemcpyAsync', 2)\nsleep_1()\n",
    "wake": "sleep_1()\nannounce('aclrtMemcpyAsync', 2)\nwake()\n",
}


@pytest.mark.parametrize("operation", BUSY)
def test_sigterm_ends_a_slow_operation(operation):
    child = start(BUSY[operation])
    assert child.stdout.readline() == "there\n"
    child.terminate()
    assert finish(child) == (-signal.SIGTERM, "", "")
    assert can_take(DEVICE_BYTES)


@pytest.mark.parametrize(("operation", "state"), [("sleep", "offloaded"), ("wake", "mapped")])
def test_a_handler_of_sigterm_runs_when_the_operation_is_whole(operation, state):
    code = (
        "def stop(*_):\n"
        "    say(*(block.state for block in weights))\n"
        "    sys.exit(8)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
    ) + BUSY[operation].replace("announce(", "announce_briefly(")
    code += "time.sleep(60)\n"  # for a signal that comes late
    brief = START.replace("def announce(", "def announce_briefly(").replace("60000", "700")
    child = start(code, prelude=brief)
    assert child.stdout.readline() == "there\n"
    child.terminate()
    assert finish(child) == (8, f"{state} {state}\n", "")
    assert can_take(DEVICE_BYTES)


PHASES = {
    "before": "say('there')\ntime.sleep(60)\n",
    "taking host memory": (
        "allocator.configure(chunk_mib=2, host_memory='acl')\n"
        "announce('aclrtMallocHost', 2)\nsleep_1()\n"
    ),
    "copying to the host": "announce('aclrtMemcpyAsync', 3)\nsleep_1()\n",
    "before the unmap": "announce('aclrtUnmapMem', 1)\nsleep_1()\n",
    "before the memory is given back": "announce('aclrtFreePhysical', 2)\nsleep_1()\n",
    "rolling back": (
        "announce('aclrtMapMem', 1)\n"
        "control.set_faults('aclrtMemcpyAsync:4:507899,aclrtMapMem:1:delay_ms=60000')\n"
        "sleep_1()\n"
    ),
    "asleep": "sleep_1()\nsay('there')\ntime.sleep(60)\n",
    "asleep at level 2": "sleep_2()\nsay('there')\ntime.sleep(60)\n",
    "taking memory": "sleep_1()\nannounce('aclrtMallocPhysical', 3)\nwake()\n",
    "mapping": "sleep_1()\nannounce('aclrtMapMem', 2)\nwake()\n",
    "copying to the device": "sleep_1()\nannounce('aclrtMemcpyAsync', 3)\nwake()\n",
    "after": "sleep_1()\nwake()\nsay('there')\ntime.sleep(60)\n",
}
# What another process can allocate meanwhile, if that is certain.
FREE_MEANWHILE = {
    "before": DEVICE_BYTES - HELD,
    "asleep": DEVICE_BYTES,
    "asleep at level 2": DEVICE_BYTES,
    "after": DEVICE_BYTES - HELD,
}


@pytest.mark.parametrize("phase", PHASES)
def test_kill_9_gives_all_device_memory_back(phase):
    child = start(PHASES[phase])
    assert child.stdout.readline() == "there\n", child.stderr.read()
    if phase in FREE_MEANWHILE:
        assert can_take(FREE_MEANWHILE[phase])
        assert not can_take(FREE_MEANWHILE[phase] + 2 * MIB)
    child.kill()
    assert finish(child) == (-signal.SIGKILL, "", "")
    assert can_take(DEVICE_BYTES)
