# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes, and how the page says them."""

MIB, GIB = 1 << 20, 1 << 30


def mib(size: int) -> str:
    return f"{size / MIB:g} MiB" if size % MIB == 0 else f"{size / MIB:.1f} MiB"


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def gib_of(part: int, whole: int) -> str:
    return f"{part / GIB:.2f} of {gib(whole)}"
