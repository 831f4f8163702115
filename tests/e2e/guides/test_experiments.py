# SPDX-License-Identifier: Apache-2.0
"""The experiments with the command lines of their guide, and the report of their logs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, programs
from helpers.server import free_ports

FOLDER = ROOT / "examples" / "sleep_experiments"


def short() -> str:
    """Options of a short run on free ports."""
    a, b = free_ports(2)
    return f"--tokens 8 --port-a {a} --port-b {b}"


def run(line: str) -> int:
    """Run a command line of the guide in the experiments' folder; returns the exit code."""
    python = shlex.quote(sys.executable)
    environment = {
        **os.environ,
        "NPU_SIM_MACHINE": f"experiments-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    line = line.replace("python ", f"{python} ", 1)
    return programs.run(["bash", "-c", line], 400, cwd=FOLDER, env=environment).returncode


def events(log: Path) -> list[dict]:
    return [json.loads(x) for x in log.read_text().splitlines() if x.startswith('{"event":')]


def names(found: list[dict]) -> list[str]:
    return [f"{event['model']} {event['event']}" for event in found if "model" in event]


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arm", "level", "rounds"),
    [
        ("online_default.py", "sleep", 1, 1),
        pytest.param("online_sleep2_nosleep.py", "sleep2", 2, 2, marks=pytest.mark.long),
    ],
)
def test_a_sleeping_arm(logs, script, arm, level, rounds):
    log = logs / f"out_info_{arm}.log"
    command = f"python {script} {arm} {short()} --rounds {rounds} > {log} 2>&1"
    assert run(command) == 0, log.read_text()[-3000:]
    found = events(log)
    loading = ["load", "warm up", "first sleep"]
    turns = [f"{model} {name}" for model in "AB" for name in ("wake", "prompt", "sleep")]
    first = [f"{model} {name}" for model in "AB" for name in loading]
    assert names(found) == [*first, *turns * rounds, "A terminate", "B terminate"]
    for event in found:
        if event["event"] in ("sleep", "first sleep"):
            assert event["level_verified"]
            assert event["weights_device"] == 0
            assert (event["weights_backup"] > 0) == (level == 1)
        if event["event"] == "wake":
            reloaded = ["wake weights", "reload_weights", "wake", "reset_prefix_cache"]
            assert list(event["steps"]) == (reloaded if level == 2 else ["wake"])
        if event["event"] == "prompt":
            assert event["text_is_the_first"] and event["tokens"] == 8
    assert found[-1]["event"] == "done"


@pytest.fixture(scope="module")
def without_sleep(logs) -> Path:
    log = logs / "out_info_nosleep.log"
    command = f"python online_default.py nosleep {short()} --rounds 1 > {log} 2>&1"
    assert run(command) == 0, log.read_text()[-3000:]
    return log


@pytest.mark.slow
def test_the_arm_without_sleep(without_sleep):
    assert names(events(without_sleep)) == [
        f"{model} {name}" for model in "AB" for name in ("load", "prompt", "terminate")
    ]


def report(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.sleep_experiments", "report", *arguments]
    return programs.run(command, 120, cwd=ROOT)


@pytest.mark.slow
def test_the_report_of_these_logs(logs, without_sleep, tmp_path):
    done = report(logs / "out_info_sleep.log", logs / "out_info_nosleep.log", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| Switch: wake, or start until it serves, A |" in done.stdout
    assert done.stdout.count("No log of") == 4
    for name in ("timeline.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long  # of the arm above that is
def test_arms_of_different_settings_are_not_compared(logs, without_sleep, tmp_path):
    done = report(logs / "out_info_sleep2.log", logs / "out_info_nosleep.log", "--out", tmp_path)
    assert done.returncode == 1
    assert "sleep2_nosleep: the arms differ in rounds: 2 and 1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_report_of_the_committed_results(tmp_path):
    done = report(FOLDER / "results", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("## Table") == 5
    assert "No log of" not in done.stdout
    committed = (FOLDER / "results" / "README.md").read_text()
    assert done.stdout.split("## Table 1")[1].strip() in committed


@pytest.mark.slow
def test_a_failed_experiment_says_why_and_is_not_reported(logs):
    log = logs / "failed.log"
    assert run(f"python online_default.py sleep {short()} --options=--nonsense > {log} 2>&1") == 1
    assert events(log)[-1]["event"] == "failed"
    assert "unrecognized arguments: --nonsense" in log.read_text()
    done = report(log)
    assert done.returncode == 1
    assert "did not start" in done.stderr


@pytest.mark.parametrize("line", ["online_default.py", "online_sleep1_2.py sleep3"])
def test_wrong_usage(line):
    assert run(f"python {line} 2> {os.devnull}") == 2
