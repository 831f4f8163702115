# SPDX-License-Identifier: Apache-2.0
"""Injects failing calls: rules for another process through a file, and the calls of this one."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from vllm_sleep_ascend.sim import control

DRIVER_ERROR = 507899
OUT_OF_MEMORY = 207001
HCCL_ERROR = 4
# Codes of host-memory calls in the field: old drivers, containers, limits.
HOST_MEMORY_CODES = (
    *(107000, 107017, 200000, 200001, 207000),
    *(207001, 207005, 500000, 507899, 507900),
)


def set_faults(file: Path, rules: str) -> None:
    """Set the fault rules of the server that reads this file; its next call obeys them.

    The simulator checks the file's time every few milliseconds, so a second change within that time
    would be missed, and a partly written file would be read.
    """
    new = file.with_name(f"{file.name}.new")
    new.write_text(rules)
    os.replace(new, file)
    time.sleep(0.01)


def calls_of(operation: Callable[[], object]) -> list[str]:
    """The names of this process's AscendCL calls in the operation, in order."""
    control.reset_counters()
    control.keep_call_log(True)
    operation()
    calls = control.call_log()
    control.keep_call_log(False)
    return calls
