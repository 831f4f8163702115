# SPDX-License-Identifier: Apache-2.0
"""The examples run as the guides write them."""

import os
import subprocess
import sys

import pytest
from support import ROOT


@pytest.mark.parametrize("in_process", ["0", "1"])
def test_the_offline_example(tiny_model, in_process):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "offline_sleep.py", tiny_model],
        env={
            **os.environ,
            "NPU_SIM_MACHINE": f"offline-{os.getpid()}",
            "NPU_SIM_HBM_GIB": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": in_process,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "The output after sleep is the output before it." in done.stdout
