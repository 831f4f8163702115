# SPDX-License-Identifier: Apache-2.0
"""A test process that crashes fails the test that it ran, and no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.patience import patience

FILES = 3
TESTS_OF_A_FILE = 3

PROGRAM = """
import os
import pytest

@pytest.mark.parametrize("number", range({tests}))
def test(number):
    if number in {crashing}:
        os._exit(1)
"""


@pytest.mark.parametrize(
    ("file", "crashing"), [(0, (0,)), (0, (0, 1, 2)), (2, (1,)), (2, (2,))], ids=str
)
def test_a_process_that_crashes_fails_its_test_alone(tmp_path: Path, file: int, crashing: tuple):
    for number in range(FILES):
        program = PROGRAM.format(tests=TESTS_OF_A_FILE, crashing=crashing if number == file else ())
        (tmp_path / f"test_{number}.py").write_text(program)
    command = [sys.executable, "-m", "pytest", "-p", "helpers.groups", "-n", "2", "-q", "-rf", "."]
    run = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "-c", "/dev/null"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "tests"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60 * patience(),
    )
    failed = re.findall(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
    assert sorted(failed) == [f"test_{file}.py::test[{number}]" for number in crashing], run.stdout
    passed = FILES * TESTS_OF_A_FILE - len(crashing)
    assert f"{len(crashing)} failed, {passed} passed" in run.stdout, run.stdout
