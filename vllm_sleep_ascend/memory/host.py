# SPDX-License-Identifier: Apache-2.0
"""Host memory: what is left of it, and where page-locked memory may come from on this kernel."""

import os
import re
from pathlib import Path
from typing import Literal

# Below it registered pages may move or be swapped, locked by mlock or not.
KERNEL_THAT_KEEPS_PAGES = (5, 19)


def available_host_bytes() -> int:
    """What the machine or this process's control group has left; of the machine alone, where the
    compiled allocator is not installed."""
    try:
        from vllm_sleep_ascend import _camem
    except ImportError:
        meminfo = Path("/proc/meminfo").read_text()
        found = re.search(r"^MemAvailable: +(\d+) kB", meminfo, re.M)
        return int(found[1]) * 1024 if found else 0
    return _camem.available_host_bytes()


def why_registered_pages_move() -> str:
    """What the running kernel lacks; empty if it keeps registered pages in place."""
    release = os.uname().release
    version = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if version >= KERNEL_THAT_KEEPS_PAGES:
        return ""
    wanted = ".".join(map(str, KERNEL_THAT_KEEPS_PAGES))
    return f"Linux {release} does not keep registered pages in place; {wanted} does"


def page_locked_source(wish: str) -> tuple[Literal["acl", "registered"], str]:
    """The source of page-locked memory by the option ``host_memory``, and why registered memory is
    not even tried."""
    if wish == "acl":
        return "acl", "host_memory says so"
    reason = why_registered_pages_move()
    return ("acl", reason) if reason else ("registered", "")
