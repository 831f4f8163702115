# SPDX-License-Identifier: Apache-2.0
"""What a process determines once, so each test uses a separate process: the source of page-locked
memory, the speed of allocating it, and the number of available streams."""

import os
import subprocess

import pytest
from helpers import MIB, ROOT
from helpers.faults import HOST_MEMORY_CODES, OUT_OF_MEMORY
from helpers.machine import LAUNCHER, USUAL_MACHINE
from helpers.patience import patience

HOST = (
    "import ctypes\n"
    "from helpers import MIB, allocator\n"
    "from vllm_sleep_ascend import _camem\n"
    "from vllm_sleep_ascend.sim import control\n"
    "allocator.start()\n"
)
CYCLE = (
    "blocks = [allocator.Block('weights', 8 * MIB, seed) for seed in range(3)]\n"
    "for cycle in range(2):\n"
    "    _camem.sleep(allocator.LEVEL_1)\n"
    "    _camem.wake(list(allocator.TAGS))\n"
    "    assert all(block.intact() for block in blocks)\n"
    "host = _camem.host_memory()\n"
    "counters = control.counters()\n"
)


def in_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [*LAUNCHER, "python", "-c", HOST + code],
        env={
            **os.environ,
            **USUAL_MACHINE,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120 * patience(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# 64 MiB in chunks of 4: enough for a measurement, which a process makes once.
LARGE = (
    "allocator.configure()\n"
    "blocks = [allocator.Block('weights', 16 * MIB, seed) for seed in range(4)]\n"
    "def plain_after_sleep(faults):\n"
    "    control.set_faults(faults)\n"
    "    _camem.sleep(allocator.LEVEL_1)\n"
    "    plain = _camem.plain_host_bytes()\n"
    "    control.set_faults('')\n"
    "    _camem.wake(list(allocator.TAGS))\n"
    "    assert all(block.intact() for block in blocks)\n"
    "    speeds = _camem.host_memory()\n"
    "    return plain > 0, speeds['locking_bytes_per_s'], speeds['copying_bytes_per_s']\n"
)


def test_page_locked_memory_that_is_slow_to_get_is_not_waited_for():
    output = in_process(LARGE + "print(*plain_after_sleep('aclrtMallocHost:1:delay_ms=50:*'))\n")
    plain, locking, copying = output.split()
    assert plain == "True" and 0 < float(locking) < float(copying)


def test_a_measurement_that_failed_is_made_again():
    output = in_process(
        LARGE + f"print(*plain_after_sleep('aclrtMallocHost:1:{OUT_OF_MEMORY}:*'))\n"
        "for block in blocks: block.free()\n"
        "blocks = [allocator.Block('weights', 16 * MIB, seed) for seed in range(4)]\n"
        "print(*plain_after_sleep(''))\n"
    )
    first, second = output.split("\n")
    assert first == "True 0.0 0.0"
    assert float(second.split()[1]) > 0


OLD, NEW = {"NPU_SIM_KERNEL": "5.10"}, {"NPU_SIM_KERNEL": "6.1"}
PINS = {**NEW, "NPU_SIM_DRIVER": "26.0"}


@pytest.mark.parametrize(
    ("wish", "machine", "source"),
    [
        ("auto", OLD, "acl"),
        ("registered", OLD, "acl"),
        ("auto", {"NPU_SIM_KERNEL": "5.18"}, "acl"),
        ("auto", {"NPU_SIM_KERNEL": "5.19"}, "registered"),
        ("auto", NEW, "registered"),
        ("auto", PINS, "registered"),
        ("acl", NEW, "acl"),
    ],
)
def test_registered_memory_is_used_where_its_pages_stay(wish, machine, source):
    output = in_process(
        f"allocator.configure(host_memory={wish!r})\n{CYCLE}"
        "print(host['source'], counters.pinned_bytes, counters.registered_bytes, host['why'])\n",
        **machine,
    )
    chosen, pinned, registered, why = output.split(" ", 3)
    assert chosen == source
    expected = {"acl": (24 * MIB, 0), "registered": (0, 24 * MIB)}
    assert (int(pinned), int(registered)) == expected[source]
    if source == "acl" and wish != "acl":
        assert f"Linux {machine['NPU_SIM_KERNEL']}.0 does not keep registered pages" in why


def test_copies_from_registered_memory_that_are_not_exact_rule_it_out():
    """mlock does nothing, as in some containers: the range is registered, and the simulated runtime
    then copies wrong data, as real hardware may."""
    output = in_process(
        f"allocator.configure()\n{CYCLE}print(host['source'], host['why'])\n",
        **NEW,
        LD_PRELOAD=without_mlock(),
    )
    assert output == "acl copies from and to registered memory are not exact"


def without_mlock() -> str:
    """A library whose mlock does nothing and succeeds."""
    folder = ROOT / "build" / "without_mlock"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libwithout_mlock.so"
    source = "int mlock(const void *p, unsigned long n) { (void)p; (void)n; return 0; }\n"
    new = library.with_suffix(f".{os.getpid()}")
    command = ["gcc", "-shared", "-fPIC", "-o", str(new), "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    new.replace(library)
    return str(library)


@pytest.mark.parametrize("code", HOST_MEMORY_CODES)
def test_whatever_registering_returns_memory_is_allocated_from_then_on(code):
    """Nor is any other block registered: what is already stays so."""
    output = in_process(
        f"allocator.configure(threads=1)\n{CYCLE}"
        "before = host['source']\n"
        "for block in blocks: block.free()\n"
        "control.reset_counters()\n"
        f"control.set_faults('aclrtHostRegisterV2:3:{code}')\n{CYCLE}"
        "print(before, host['source'], counters.registered_bytes, counters.pinned_bytes,"
        " control.call_count('aclrtHostRegisterV2'), host['why'])\n",
        **NEW,
    )
    before, source, registered, allocated, calls, why = output.split(" ", 5)
    assert (before, source) == ("registered", "acl")
    assert (int(registered), int(allocated), int(calls)) == (8 * MIB, 16 * MIB, 3)
    assert f"aclrtHostRegisterV2 failed with {code}" in why


def test_what_can_be_neither_registered_nor_allocated_is_plain():
    output = in_process(
        f"allocator.configure(unprepared='lock')\n{CYCLE}"
        "for block in blocks: block.free()\n"
        f"control.set_faults('aclrtHostRegisterV2:3:507899:*,aclrtMallocHost:1:507899:*')\n{CYCLE}"
        "total = lambda key: sum(a[key] for a in _camem.allocations())\n"
        "print(total('host_bytes'), total('page_locked_bytes'))\n"
        "for block in blocks: block.free()\n"
        "print(_camem.pinned_host_bytes(), _camem.plain_host_bytes())\n",
        **NEW,
    )
    assert output == f"{24 * MIB} {8 * MIB}\n0 0"


def test_a_limit_on_locked_memory_is_met_by_memory_that_does_not_count():
    """RLIMIT_MEMLOCK of two chunks; it applies to processes without CAP_IPC_LOCK."""
    output = in_process(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * MIB, 8 * MIB))\n"
        "CAP_IPC_LOCK, VERSION_3 = 14, 0x20080522\n"
        "libc = ctypes.CDLL(None)\n"
        "header = (ctypes.c_uint32 * 2)(VERSION_3, 0)\n"
        "sets = (ctypes.c_uint32 * 6)()\n"
        "assert libc.capget(header, sets) == 0\n"
        "sets[0] &= ~(1 << CAP_IPC_LOCK)\n"
        "assert libc.capset(header, sets) == 0\n"
        "from helpers.logs import messages_of\n"
        "from vllm_sleep_ascend.config import SleepModeConfig\n"
        "from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory\n"
        "memory = SleepingMemory()\n"
        "memory.configure(SleepModeConfig(chunk_mib=4, host_backup='on_demand'))\n"
        "block = allocator.Block('weights', 4 * MIB)\n"
        "log = messages_of('memory.sleeping_memory')\n"
        "warnings = log.__enter__()\n"
        "memory.sleep('sleep', allocator.LEVEL_1)\n"
        "memory.wake(list(allocator.TAGS))\n"
        f"before = memory.host_memory()['source'], len(warnings)\n{CYCLE}"
        "memory.sleep('sleep', allocator.LEVEL_1)\n"
        "memory.wake(list(allocator.TAGS))\n"
        "memory.sleep('sleep', allocator.LEVEL_1)\n"
        "print(*before, memory.host_memory()['source'],"
        " counters.pinned_bytes, counters.registered_bytes)\n"
        "print(memory.host_memory()['why'])\n"
        "print(*warnings, sep='\\n')\n",
        **NEW,
    )
    figures, why, *warnings = output.split("\n")
    assert figures.split() == ["registered", "0", "acl", str(20 * MIB), str(8 * MIB)]
    assert "could not be registered" in why and "ulimit -l" in why
    assert warnings == [f"camem: page-locked host memory is that of aclrtMallocHost: {why}"]


def test_what_is_freed_after_an_operator_failed_is_kept_until_the_process_ends():
    """AscendCL does not tell any more when work on it ends. No sleep or wake begins either."""
    output = in_process(
        "from vllm_sleep_ascend.errors import SleepModeError\n"
        "Run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)\n"
        "class Kernel(ctypes.Structure):\n"
        "    _fields_ = [('name', ctypes.c_char_p), ('argument', ctypes.c_void_p), ('run', Run),"
        " *((name, ctypes.c_void_p) for name in ('launched', 'skip', 'release'))]\n"
        "allocator.configure()\n"
        "block, staying = (allocator.Block('weights', 4 * MIB) for _ in range(2))\n"
        "fails = ctypes.CDLL('libascendcl.so').npuSimFail\n"
        "kernel = Kernel(b'operator', None, Run(lambda _: fails(507000, b'it failed')))\n"
        "launch = ctypes.CDLL('libascendcl.so').npuSimLaunch\n"
        "assert launch(None, ctypes.byref(kernel), None, ctypes.c_size_t(0)) == 0\n"
        "def refusal(operation, *arguments):\n"
        "    try: operation(*arguments)\n"
        "    except SleepModeError as error:\n"
        "        return error.code, 'nothing was touched' in str(error)\n"
        "print(*refusal(_camem.sleep, allocator.LEVEL_1))\n"
        "block.free()\n"
        "print(*refusal(_camem.wake, ['weights']), len(_camem.allocations()),"
        " control.counters().device_bytes)\n"
    )
    assert output == f"507000 True\n507000 True 1 {8 * MIB}"


@pytest.mark.parametrize("left", [0, 1, 5, 20])
def test_whatever_streams_are_left_are_enough(left):
    """``NPU_SIM_STREAMS`` includes the device's default stream."""
    output = in_process(
        f"allocator.configure(threads=4)\n{CYCLE}"
        "print(counters.streams, control.call_count('aclrtMemcpyAsync') > 0)\n",
        NPU_SIM_STREAMS=str(left + 1),
        NPU_SIM_MACHINE=f"streams-{left}-{os.getpid()}",
    )
    # At most six, and at most half of the available ones. The default stream of our own context is
    # not counted.
    assert output.split() == [str(max(0, min(6, (left + 1) // 2) - 1)), str(left > 0)]
