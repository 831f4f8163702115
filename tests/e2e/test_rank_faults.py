# SPDX-License-Identifier: Apache-2.0
"""A sample of the sweep of ``make rank-faults``."""

import json
import os
import subprocess
import sys

from support import ROOT


def test_ranks_agree_whichever_call_fails_on_one(tiny_model) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "rank_faults.py", tiny_model, "--sample"],
        env={**os.environ, "HCCL_CONNECT_TIMEOUT": "4"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # vLLM's log lines are there too.
    results = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    for level in results.values():
        assert level["faults"] >= 20 and level["reported"] >= 10, results
        assert "did not happen" not in level, results
