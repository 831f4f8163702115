# SPDX-License-Identifier: Apache-2.0
"""Content in which no page is like another, and comparing it.

It is made once, of ``LIMIT`` bytes: fresh memory for each probe would take longer than the probes.
"""

import ctypes
import random
from functools import cache

LIMIT = 64 << 20
PAGE = 4096

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

# Not a multiple of a page: what repeats begins elsewhere in each page.
_PERIOD = (1 << 18) + 509


@cache
def _source() -> ctypes.Array:
    period = random.Random(1).randbytes(_PERIOD)
    return ctypes.create_string_buffer(period * (LIMIT // _PERIOD + 2))


@cache
def _scratch() -> ctypes.Array:
    return ctypes.create_string_buffer(LIMIT)


def content(number: int) -> int:
    """The address of ``LIMIT`` bytes, other ones for each number below 500."""
    return ctypes.addressof(_source()) + number * 509


def scratch() -> int:
    """The address of ``LIMIT`` bytes to read into."""
    return ctypes.addressof(_scratch())


def wrong_pages(address: int, expected: int, size: int) -> int:
    """How many pages at this address of the host are not as expected."""
    if _libc.memcmp(address, expected, size) == 0:
        return 0
    return sum(
        _libc.memcmp(address + offset, expected + offset, min(PAGE, size - offset)) != 0
        for offset in range(0, size, PAGE)
    )
