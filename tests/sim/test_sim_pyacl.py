# SPDX-License-Identifier: Apache-2.0
"""pyACL of the simulated toolkit."""

import ctypes

import acl
import pytest
from helpers.ascendcl import (
    DEVICE_TO_HOST,
    HBM_MEM,
    HOST_TO_DEVICE,
    HOST_TO_HOST,
    MIB,
    RT_PARAM,
    UNSUPPORTED,
    ok,
)


@pytest.fixture
def buffer():
    address = ctypes.c_void_p()
    ok("aclrtMalloc", ctypes.byref(address), ctypes.c_size_t(2 * MIB), 0)
    yield address.value
    ok("aclrtFree", address)


def test_copies(buffer):
    sent, received = ctypes.create_string_buffer(b"pyACL", 8), ctypes.create_string_buffer(8)
    to, back = ctypes.addressof(sent), ctypes.addressof(received)
    assert acl.rt.memcpy(buffer, 8, to, 8, HOST_TO_DEVICE) == 0
    assert acl.rt.memset(buffer + 1, 1, ord("Y"), 1) == 0
    assert acl.rt.memcpy(back, 8, buffer, 8, DEVICE_TO_HOST) == 0
    assert received.value == b"pYACL"


def test_refusals(buffer):
    host = ctypes.addressof(ctypes.create_string_buffer(8))
    assert acl.rt.memcpy(buffer, 4, host, 8, HOST_TO_DEVICE) == RT_PARAM
    assert acl.rt.memcpy(host, 8, host, 8, HOST_TO_HOST) == UNSUPPORTED


def test_answers_come_before_the_code(buffer):
    assert acl.rt.set_device(0) == 0
    assert acl.rt.get_device() == (0, 0)
    assert acl.rt.synchronize_device() == 0
    free, total, code = acl.rt.get_mem_info(HBM_MEM)
    assert code == 0 and total - free >= 2 * MIB
