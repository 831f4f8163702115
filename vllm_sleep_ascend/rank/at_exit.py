# SPDX-License-Identifier: Apache-2.0
"""The order in which a process ends."""

import atexit
import weakref
from functools import cache


@cache
def finish_before_torch_npu() -> None:
    """At exit, end objects that own device memory or process groups before torch_npu.

    An engine in the main process ends in a finalizer. Python runs all finalizers at the position of
    the first one, which is after torch_npu has closed the device and its process groups.
    """
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
