# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that reports slow tests and the number of engine and server starts."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SLOWEST = 15

_FOLDER = "TEST_REPORT"  # names the folder in which the run's processes write figures


@contextmanager
def start_of(kind: str) -> Iterator[None]:
    """Record a start of that kind and its duration."""
    began = time.monotonic()
    yield
    if folder := os.environ.get(_FOLDER):
        with (Path(folder) / str(os.getpid())).open("a") as file:
            file.write(f"{kind} {time.monotonic() - began}\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and _FOLDER not in os.environ:
        import tempfile

        config.stash[_made] = tempfile.TemporaryDirectory(prefix="test-report-")
        os.environ[_FOLDER] = config.stash[_made].name


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    seconds: dict[str, float] = defaultdict(float)
    for outcome in ("", "passed", "failed", "error", "skipped"):  # "": set-up and clean-up
        for report in terminalreporter.getreports(outcome):
            seconds[report.nodeid] += getattr(report, "duration", 0)
    if not seconds or _made not in terminalreporter.config.stash:
        return
    terminalreporter.section(f"{SLOWEST} slowest tests, with their fixtures")
    for name in sorted(seconds, key=lambda name: -seconds[name])[:SLOWEST]:
        write(f"{seconds[name]:7.1f} s  {name}")
    folders: dict[str, float] = defaultdict(float)
    for name, took in seconds.items():
        folders[name.partition("::")[0].rpartition("/")[0]] += took
    ordered = sorted(folders.items(), key=lambda item: -item[1])
    write(", ".join(f"{folder} {took:.0f} s" for folder, took in ordered))
    starts: dict[str, list[float]] = defaultdict(list)
    for file in Path(os.environ[_FOLDER]).iterdir():
        for line in file.read_text().splitlines():
            kind, took = line.split()
            starts[kind].append(float(took))
    for kind, took_each in sorted(starts.items()):
        write(f"{len(took_each)} {kind} starts, {sum(took_each):.0f} s in all")
    terminalreporter.config.stash[_made].cleanup()
    del os.environ[_FOLDER]


_made = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()
