# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own sleep mode without ours, for comparison."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MIB
from helpers.ascend_engine import ITS_OWN
from helpers.models import make_model
from helpers.reference import hf_greedy


def own_sleep(model: Path, level: int) -> dict:
    result = subprocess.run(
        [sys.executable, "-m", "helpers.own_sleep", model, str(level)],
        env={**os.environ, **ITS_OWN},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("level", [1, 2])
def test_a_dense_model(tiny_model, level):
    """Weights and cache are freed and restored, and the answers are the same."""
    seen = own_sleep(tiny_model, level)
    assert seen["tokens"] == hf_greedy(tiny_model)
    assert seen["pool"] >= 64 * MIB
    assert seen["free asleep"] - seen["free awake"] >= seen["pool"]
    assert seen["free asleep"] - seen["free again"] >= seen["pool"]
    assert seen["tokens again"] == seen["tokens"]


def test_experts():
    """A wake from level 1 switches the experts' weights to the checkpoint's layout. Nothing loads
    them again, so the next step is refused."""
    model = make_model("tiny-qwen3-moe")
    seen = own_sleep(model, 1)
    assert seen["tokens"] == hf_greedy(model)
    assert seen["turned"] == ["w13_weight", "w2_weight"]
    assert "npu_grouped_matmul: rows" in seen["error"]
