# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep``, as an operator runs it."""

import subprocess
import sys


def vllm_sleep(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """Run it, and check its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_sleep_ascend.client.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done
