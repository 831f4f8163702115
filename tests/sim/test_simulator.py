# SPDX-License-Identifier: Apache-2.0
"""Runs all tests of the simulator in a run with other tests."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.machine import LAUNCHER


@pytest.mark.slow
def test_the_simulator() -> None:
    folder = Path(__file__).parent
    result = subprocess.run(
        [*LAUNCHER, sys.executable, "-m", "pytest", "-q", str(folder)],
        cwd=folder.parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
