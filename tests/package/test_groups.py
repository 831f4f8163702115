# SPDX-License-Identifier: Apache-2.0
"""If a test process crashes, only the test that it was running fails."""

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

@pytest.mark.parametrize("number", range({tests} + os.path.exists("more")))
def test(number):
    if number in {crashing}:
        {first}
        os._exit(1)
"""


def run(folder: Path, crashing: dict[int, tuple], first: str = "pass") -> tuple[int, str]:
    """Exit code and output of a run with two processes, in which these tests crash."""
    for number in range(FILES):
        numbers = crashing.get(number, ())
        program = PROGRAM.format(tests=TESTS_OF_A_FILE, crashing=numbers, first=first)
        (folder / f"test_{number}.py").write_text(program)
    command = [sys.executable, "-m", "pytest", "-p", "helpers.groups", "-n", "2", "-q", "-rf", "."]
    done = subprocess.run(
        [*command, f"--rootdir={folder}", "-c", "/dev/null"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "tests"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60 * patience(),
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "crashing", [{0: (0,)}, {0: (0, 1, 2)}, {2: (2,)}, {0: (1,), 1: (1,)}], ids=str
)
def test_a_process_that_crashes_fails_its_test_alone(tmp_path: Path, crashing: dict[int, tuple]):
    code, said = run(tmp_path, crashing)
    failed = [f"test_{file}.py::test[{n}]" for file, numbers in crashing.items() for n in numbers]
    assert sorted(re.findall(r"^FAILED (\S+)", said, re.MULTILINE)) == failed, said
    passed = FILES * TESTS_OF_A_FILE - len(failed)
    assert f"{len(failed)} failed, {passed} passed" in said, said
    assert code == 1


def test_a_process_that_finds_other_tests_ends_the_run_and_hangs_nothing(tmp_path: Path):
    code, said = run(tmp_path, {0: (0,), 1: (0,)}, first="open('more', 'w')")
    assert code not in (0, 5), said
    assert "no active workers" in said, said
