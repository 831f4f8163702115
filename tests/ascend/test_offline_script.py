# SPDX-License-Identifier: Apache-2.0
"""The offline script of vllm-ascend's guide as it is written, with our sleep mode and its own."""

import os
import subprocess
import sys

import pytest
from test_published_guides import GUIDE_MODEL, OFFLINE


@pytest.mark.parametrize(
    ("switch", "log"),
    [("1", "camem: sleep level 1 took"), ("0", "Sleep mode (level=1) freed")],
    ids=["ours", "its own"],
)
def test_the_guides_offline_script(tiny_model, tmp_path, switch, log):
    """The model is on this machine; the hub that it would come from (ModelScope) is left out."""
    script = tmp_path / "guide.py"
    script.write_text(
        OFFLINE.replace(GUIDE_MODEL, str(tiny_model)).replace(
            'os.environ["VLLM_USE_MODELSCOPE"] = "True"', ""
        )
    )
    env = {
        **os.environ,
        "NPU_SIM_MACHINE": f"guide-{os.getpid()}",
        "OMP_NUM_THREADS": "2",
        "TORCH_COMPILE_DISABLE": "1",  # vLLM's way to eager mode for a script that does not ask
        "VLLM_SLEEP_ASCEND": switch,
    }
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "text:" in done.stdout
    assert log in done.stdout
