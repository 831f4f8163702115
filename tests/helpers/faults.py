# SPDX-License-Identifier: Apache-2.0
"""Calls of the simulated device that fail: in another process by a file, in this one by a log."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from vllm_sleep_ascend.sim import control

DRIVER_ERROR = 507899
OUT_OF_MEMORY = 207001
HCCL_ERROR = 4
# What calls that take or register host memory return in the field: old drivers, containers, limits.
HOST_MEMORY_CODES = (
    *(107000, 107017, 200000, 200001, 207000),
    *(207001, 207005, 500000, 507899, 507900),
)


def set_faults(file: Path, rules: str) -> None:
    """From its next call on, the simulated device of the server that reads this file obeys them.

    It looks at the file's time every few milliseconds, in which it would miss a second change, and
    would read a file that is being written."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(rules)
    os.replace(new, file)
    time.sleep(0.01)


def calls_of(operation: Callable[[], object]) -> list[str]:
    """The names of the calls of AscendCL that this process makes in the operation, in order."""
    control.reset_counters()
    control.keep_call_log(True)
    operation()
    calls = control.call_log()
    control.keep_call_log(False)
    return calls
