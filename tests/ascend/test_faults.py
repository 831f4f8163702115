# SPDX-License-Identifier: Apache-2.0
"""One failing AscendCL call, through our replacement of vllm-ascend's allocator class."""

import subprocess
import sys

from helpers import ascend_sweep as sweep
from helpers.patience import patience


def test_no_single_fault_loses_weights_or_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-m", sweep.__name__],
        capture_output=True,
        text=True,
        timeout=500 * patience(),
    )
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
    assert rows, done.stdout[-2000:] + done.stderr[-4000:]
    table = {
        call: dict(zip(sweep.OUTCOMES, map(int, counts), strict=True)) for call, *counts in rows
    }
    assert sum(row["survived"] for row in table.values()) >= 50
    assert {call: row for call, row in table.items() if sum(row.values()) > row["survived"]} == {}
    assert "aclrtMallocPhysical" in table
    assert "aclrtUnmapMem" in table
