# SPDX-License-Identifier: Apache-2.0
"""The examples run as the guides write them."""

import json
import os
import subprocess
import sys

import pytest
from helpers import MIB, ROOT, warm


@pytest.mark.parametrize("in_process", ["0", "1"])
def test_the_offline_example(tiny_model, in_process, tmp_path):
    done = warm.run(
        [ROOT / "examples" / "offline_sleep.py", tiny_model],
        tmp_path / "log",
        timeout=240,
        env={
            **os.environ,
            "NPU_SIM_MACHINE": f"offline-{os.getpid()}",
            "NPU_SIM_HBM_GIB": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": in_process,
        },
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "The output after sleep is the output before it." in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_rlhf_example(tiny_model, devices, tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "memory.png"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "examples" / "rlhf_colocate.py", tiny_model),
            *("--tensor-parallel-size", str(devices), "--json", figures, "--plot", picture),
        ],
        env={
            **os.environ,
            "RAY_worker_niceness": "0",
            "NPU_SIM_MACHINE": f"rlhf-{os.getpid()}",
            "NPU_SIM_DEVICES": str(devices),
            "NPU_SIM_HBM_GIB": "0.5",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "The updated engine answers as a fresh one with the trained checkpoint." in done.stdout
    assert picture.stat().st_size > 10_000
    run = json.loads(figures.read_text())
    assert [len(tokens) for tokens in run["tokens"]] == [24] * 4
    assert run["rewards"][-1] > run["rewards"][0]

    def used(phase: str) -> list[int]:
        """By all steps and devices, at the end of the phase."""
        return [n for p in run["phases"] if p["name"] == phase for n in p["used_bytes"]]

    awake, asleep, updated = used("wake KV cache"), used("sleep"), used("update")
    assert len(awake) == len(updated) == 3 * devices
    assert max(asleep) < 40 * MIB < 128 * MIB < min(awake)
    assert max(updated) < 64 * MIB  # no KV cache yet
    # The first step makes what torch keeps; after that nothing grows.
    assert max(asleep[2 * devices :]) <= max(asleep[devices : 2 * devices])
