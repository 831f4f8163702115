# SPDX-License-Identifier: Apache-2.0
"""Engines under torchrun, in each process beside a trainer: one engine over two ranks, and two
separate engines."""

import json
import os

import pytest
from helpers import ROOT, warm
from helpers.models import other_weights
from helpers.reference import hf_few


@pytest.mark.parametrize(
    "alone", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tp2", "replicas"]
)
def test_weights_come_from_a_trainer_in_the_same_process(tiny_model, tmp_path, alone):
    other = other_weights(tiny_model, tmp_path / "other")
    models = [tiny_model, other]
    case = tmp_path / "case.json"
    case.write_text(
        json.dumps(
            {
                "alone": alone,
                "models": [str(model) for model in models],
                "expected": [hf_few(model) for model in models],
            }
        )
    )
    machine = {"NPU_SIM_MACHINE": f"launched-{alone}-{os.getpid()}"}
    program = ROOT / "tests" / "helpers" / "launched.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    if not alone:
        launcher.append("--run-path")  # starts ranks through multiprocessing, so they are warm
    run = warm.run(
        [*launcher, program, case],
        tmp_path / "log",
        seconds=120,
        env={**os.environ, **machine},
        cold=alone,
    )
    assert run.returncode == 0, run.stdout[-8000:]
