# SPDX-License-Identifier: Apache-2.0
"""Test content in which all pages differ, and its comparison.

``LIMIT`` bytes are created once, because new memory for each probe would be slower than the probes.
"""

import ctypes
import random
from functools import cache

LIMIT = 64 << 20
PAGE = 4096

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

# Not a multiple of the page size, so that the pattern starts at a different place in each page.
_PERIOD = (1 << 18) + 509


@cache
def _source() -> ctypes.Array:
    period = random.Random(1).randbytes(_PERIOD)
    return ctypes.create_string_buffer(period * (LIMIT // _PERIOD + 2))


@cache
def _scratch() -> ctypes.Array:
    return ctypes.create_string_buffer(LIMIT)


def content(number: int) -> int:
    """The address of ``LIMIT`` bytes that differ for each number below 500."""
    return ctypes.addressof(_source()) + number * 509


def scratch() -> int:
    """The address of ``LIMIT`` bytes to read into."""
    return ctypes.addressof(_scratch())


def wrong_pages(address: int, expected: int, size: int) -> int:
    """The number of pages at this host address that differ from what is expected."""
    if _libc.memcmp(address, expected, size) == 0:
        return 0
    return sum(
        _libc.memcmp(address + offset, expected + offset, min(PAGE, size - offset)) != 0
        for offset in range(0, size, PAGE)
    )
