# SPDX-License-Identifier: Apache-2.0
"""Registered host memory: asynchronous copies are correct only if its pages are locked."""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from ctypes import c_uint32, c_uint64
from pathlib import Path

import pytest
from helpers.ascendcl import (
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    REGISTER_MAPPED,
    REGISTER_PINNED,
    SUCCESS,
    UNSUPPORTED,
    bytes_at,
    call,
    malloc,
    malloc_host,
    memcpy,
    memcpy_async,
    ok,
    run_python,
    stream,
)

PAGE = mmap.PAGESIZE
SIZE = 4 * PAGE
DATA = b"data" * (SIZE // 4)
WRONG = b"\x7f" * PAGE

# The environment of each host profile.
OLD_KERNEL = {"NPU_SIM_KERNEL": "5.10"}  # as in this process
NEW_KERNEL = {"NPU_SIM_KERNEL": "5.15"}
NEW_DRIVER = {"NPU_SIM_KERNEL": "6.1", "NPU_SIM_DRIVER": "26.0"}
MLOCK = "assert ctypes.CDLL(None).mlock(c_void_p(host), c_size_t(SIZE)) == 0"


# The start of a separate process: pages with DATA at `host`.
HOST_MEMORY = """
from test_sim_page_locks import *
memory = (ctypes.c_char * SIZE).from_buffer(mmap.mmap(-1, SIZE))
memory.raw, host = DATA, ctypes.addressof(memory)
"""


def register(host: int, size: int, flag: int = REGISTER_PINNED) -> int:
    return call("aclrtHostRegisterV2", host, c_uint64(size), c_uint32(flag))


@pytest.fixture
def pages() -> Iterator[int]:
    memory = mmap.mmap(-1, SIZE)
    view = (ctypes.c_char * SIZE).from_buffer(memory)
    view.raw = DATA
    yield ctypes.addressof(view)
    del view
    memory.close()


@pytest.fixture
def on_device() -> Iterator[int]:
    code, address = malloc(SIZE)
    assert code == SUCCESS
    yield address
    ok("aclrtFree", address)


@pytest.fixture
def queue() -> Iterator[int]:
    handle = stream()
    yield handle
    ok("aclrtDestroyStream", handle)


def copied(on_device: int, host: int, queue: int, size: int = SIZE) -> bytes:
    """What arrives on the device after an asynchronous copy that reports success."""
    assert memcpy_async(on_device, host, size, HOST_TO_DEVICE, queue) == SUCCESS
    ok("aclrtSynchronizeStream", queue)
    return bytes_at(on_device, size)


def came_back(on_device: int, host: int, queue: int) -> bytes:
    """What arrives on the host after such a copy."""
    source = ctypes.create_string_buffer(DATA, SIZE)
    assert memcpy(on_device, ctypes.addressof(source), SIZE, HOST_TO_DEVICE) == SUCCESS
    ctypes.memset(host, 0, SIZE)
    assert memcpy_async(host, on_device, SIZE, DEVICE_TO_HOST, queue) == SUCCESS
    ok("aclrtSynchronizeStream", queue)
    return bytes_at(host, SIZE)


def test_memory_from_aclrt_malloc_host_is_there_at_once_and_not_in_a_forked_child():
    size = 8 << 20
    start = malloc_host(size)
    maps = Path("/proc/self/smaps").read_text()
    (block,) = re.findall(rf"^{start:x}-.*\n(?:[A-Z].*\n)+", maps, re.MULTILINE)
    assert int(re.search(r"^Rss: +(\d+) kB", block, re.MULTILINE)[1]) << 10 == size
    assert "dc" in re.search(r"^VmFlags: (.*)", block, re.MULTILINE)[1].split()
    ok("aclrtFreeHost", start)


def test_registered_memory_is_not_locked(pages: int, on_device: int, queue: int) -> None:
    assert register(pages, SIZE) == SUCCESS
    assert copied(on_device, pages, queue) == WRONG + DATA[PAGE:]
    assert copied(on_device, pages + PAGE, queue, size=100) == WRONG[:100]
    assert came_back(on_device, pages, queue) == WRONG + DATA[PAGE:]
    ok("aclrtHostUnregister", pages)


def test_synchronous_copies_of_it_are_right(pages: int, on_device: int) -> None:
    assert register(pages, SIZE) == SUCCESS
    assert memcpy(on_device, pages, SIZE, HOST_TO_DEVICE) == SUCCESS
    assert bytes_at(on_device, SIZE) == DATA
    ok("aclrtHostUnregister", pages)


def test_so_are_copies_of_memory_that_is_not_registered(
    pages: int, on_device: int, queue: int
) -> None:
    assert copied(on_device, pages, queue) == DATA
    assert came_back(on_device, pages, queue) == DATA


def test_and_of_memory_from_aclrt_malloc_host(on_device: int, queue: int) -> None:
    host = malloc_host(SIZE)
    ctypes.memmove(host, DATA, SIZE)
    assert copied(on_device, host, queue) == DATA
    assert came_back(on_device, host, queue) == DATA
    assert register(host, SIZE, REGISTER_MAPPED) == SUCCESS
    assert copied(on_device, host, queue) == DATA
    ok("aclrtHostUnregister", host)
    ok("aclrtFreeHost", host)


def test_a_copy_that_starts_in_registered_memory_is_asynchronous_beyond_it() -> None:
    result = run_python(
        HOST_MEMORY + "assert register(host, PAGE) == SUCCESS\n"
        f"{MLOCK}\n"
        "arrived = copied(malloc(SIZE)[1], host, stream())\n"
        "assert arrived == DATA[:PAGE] + WRONG + DATA[2 * PAGE:]",
        **profile(NEW_KERNEL),
    )
    assert result.returncode == 0, result.stderr


def profile(environment: dict[str, str]) -> dict[str, str]:
    """Run a process with this environment, which can import this module."""
    return {**environment, "PYTHONPATH": ":".join(sys.path)}


@pytest.mark.parametrize(
    ("environment", "flag", "prepare", "is_right"),
    [
        (OLD_KERNEL, REGISTER_PINNED, MLOCK, False),
        (OLD_KERNEL, REGISTER_MAPPED, "", False),
        (NEW_KERNEL, REGISTER_PINNED, "", False),
        (NEW_KERNEL, REGISTER_PINNED, MLOCK, True),
        (NEW_KERNEL, REGISTER_PINNED, MLOCK.replace("SIZE", "SIZE - PAGE"), False),
        (NEW_KERNEL, REGISTER_MAPPED, "", True),
        (NEW_KERNEL, REGISTER_MAPPED | REGISTER_PINNED, "", True),
        ({"NPU_SIM_KERNEL": "6.1"}, REGISTER_PINNED, "", False),
        (NEW_DRIVER, REGISTER_PINNED, "", True),
    ],
)
def test_which_registered_memory_is_locked(
    environment: dict[str, str], flag: int, prepare: str, is_right: bool
) -> None:
    result = run_python(
        HOST_MEMORY + f"{prepare}\n"
        f"assert register(host, SIZE, {flag}) == SUCCESS\n"
        "address, queue = malloc(SIZE)[1], stream()\n"
        "there = copied(address, host, queue)\n"
        "back = came_back(address, host, queue)\n"
        f"assert (there == DATA, back == DATA) == ({is_right}, {is_right})",
        **profile(environment),
    )
    assert result.returncode == 0, result.stderr


def test_a_driver_that_pins_refuses_on_a_kernel_that_does_not_keep_pages() -> None:
    result = run_python(
        HOST_MEMORY + f"assert register(host, SIZE) == {UNSUPPORTED}",
        **profile({"NPU_SIM_KERNEL": "5.15", "NPU_SIM_DRIVER": "26.0"}),
    )
    assert result.returncode == 0, result.stderr
