# SPDX-License-Identifier: Apache-2.0
"""The unchanged offline script of vllm-ascend's guide prints the same text with our sleep mode and
with its own."""

import os
import re
import subprocess
import sys

import pytest
from test_published_guides import GUIDE_MODEL, OFFLINE


@pytest.mark.timeout(1100)
def test_the_guides_offline_script(tiny_model, tmp_path):
    ours = text_of_the_script(tiny_model, tmp_path, "1", "camem: sleep level 1 took")
    assert ours == text_of_the_script(tiny_model, tmp_path, "0", "Sleep mode (level=1) freed")


def text_of_the_script(tiny_model, tmp_path, switch: str, log: str) -> str:
    script = tmp_path / "guide.py"
    script.write_text(OFFLINE.replace(GUIDE_MODEL, str(tiny_model)))
    env = {
        **os.environ,
        "NPU_SIM_MACHINE": f"guide-{os.getpid()}",
        "OMP_NUM_THREADS": "2",
        "TORCH_COMPILE_DISABLE": "1",  # eager mode for a script that does not set it
        "VLLM_SLEEP_ASCEND": switch,
    }
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert log in done.stdout
    return re.search(r"^text: (.*)$", done.stdout, flags=re.M)[1]
