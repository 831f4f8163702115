# SPDX-License-Identifier: Apache-2.0
"""Waiting for a condition, with a longer deadline on a busy machine.

``TEST_PATIENCE`` multiplies every deadline. Without it, the load at the start of the run does.
"""

import os
import time
from collections.abc import Callable
from functools import cache


@cache
def patience() -> float:
    """The factor: 2 if every running process has a processor, more otherwise."""
    given = os.environ.get("TEST_PATIENCE")
    if given is not None:
        return float(given)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return 2.0 * max(1.0, busy)


def deadline(seconds: float) -> float:
    """A time of ``time.monotonic``: this many seconds from now, times the factor."""
    return time.monotonic() + seconds * patience()


def wait_for(
    condition: Callable[[], object], what: str = "the condition", seconds: float = 20
) -> None:
    """Return once the condition holds.

    Raises:
        AssertionError: it does not hold within ``seconds`` times the factor.
    """
    end = deadline(seconds)
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds * patience():.0f} s"
        time.sleep(0.02)
