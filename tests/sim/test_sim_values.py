# SPDX-License-Identifier: Apache-2.0
"""Values in device memory that streams write and wait for."""

from ctypes import c_uint32, c_uint64

import pytest
from helpers.ascendcl import (
    INVALID_PARAM,
    RT_PARAM,
    SUCCESS,
    SYNC_TIMEOUT,
    Mapped,
    bytes_at,
    call,
    ok,
)

UNALIGNED = 107008
AT_LEAST, EQUAL, ANY_BIT, NOT_ALL = range(4)


def write(address: int | None, value: int, queue: int | None, flag: int = 0) -> int:
    return call("aclrtValueWrite", address, c_uint64(value), c_uint32(flag), queue)


def wait(address: int | None, value: int, flag: int, queue: int) -> int:
    return call("aclrtValueWait", address, c_uint64(value), c_uint32(flag), queue)


@pytest.mark.parametrize(
    ("flag", "value", "too_early", "enough"),
    [(AT_LEAST, 5, 4, 6), (EQUAL, 5, 6, 5), (ANY_BIT, 6, 1, 2), (NOT_ALL, 2**64 - 2, 1, 2)],
)
def test_a_stream_waits_until_another_writes(
    memory: Mapped, queue: int, other: int, flag: int, value: int, too_early: int, enough: int
) -> None:
    assert write(memory.address, too_early, other) == SUCCESS
    ok("aclrtSynchronizeStream", other)
    assert wait(memory.address, value, flag, queue) == SUCCESS
    assert write(memory.address + 8, 9, queue) == SUCCESS
    assert call("aclrtSynchronizeStreamWithTimeout", queue, 20) == SYNC_TIMEOUT
    assert write(memory.address, enough, other) == SUCCESS
    ok("aclrtSynchronizeStream", queue)
    assert bytes_at(memory.address, 16) == enough.to_bytes(8, "little") + b"\x09" + bytes(7)


def test_what_is_refused(memory: Mapped, queue: int) -> None:
    assert write(None, 1, queue) == wait(None, 1, EQUAL, queue) == INVALID_PARAM
    assert write(memory.address + 4, 1, queue) == UNALIGNED
    assert write(memory.address - 8, 1, queue) == RT_PARAM
    assert write(memory.address, 1, queue, flag=1) == RT_PARAM
    assert wait(memory.address, 1, 4, queue) == RT_PARAM
