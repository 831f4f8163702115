# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that reports slow tests, processor time, and the number of engine and server
starts."""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

SLOWEST = 15

_FOLDER = "TEST_REPORT"  # names the folder in which the run's processes write figures
_START, _PROCESSOR = "start", "processor"  # what a figure is of


@contextmanager
def start_of(kind: str) -> Iterator[None]:
    """Record a start of that kind and its duration."""
    began = time.monotonic()
    yield
    _write(_START, kind, time.monotonic() - began)


def _write(kind: str, name: str, seconds: float) -> None:
    if folder := os.environ.get(_FOLDER):
        with (Path(folder) / str(os.getpid())).open("a") as file:
            file.write(f"{kind} {name} {seconds}\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and _FOLDER not in os.environ:
        import tempfile

        config.stash[_made] = tempfile.TemporaryDirectory(prefix="test-report-")
        os.environ[_FOLDER] = config.stash[_made].name


def _processor_seconds() -> float:
    """Of this process and all that it has started, running or ended."""
    times = []
    for process in (this := psutil.Process(), *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times.append(process.cpu_times())
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _processor_seconds()
    try:
        return (yield)
    finally:
        _write(_PROCESSOR, item.nodeid.partition("::")[0], _processor_seconds() - before)


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
    processor: dict[str, float] = defaultdict(float)
    for file in Path(os.environ[_FOLDER]).iterdir():
        for line in file.read_text().splitlines():
            kind, name, took = line.split()
            if kind == _PROCESSOR:
                processor[name] += float(took)
            else:
                starts[name].append(float(took))
    for name, took_each in sorted(starts.items()):
        write(f"{len(took_each)} {name} starts, {sum(took_each):.0f} s in all")
    write(f"{sum(processor.values()) / 60:.1f} minutes of processor time, and most of it in")
    for name in sorted(processor, key=lambda name: -processor[name])[:SLOWEST]:
        write(f"{processor[name]:7.1f} s  {name}")
    terminalreporter.config.stash[_made].cleanup()
    del os.environ[_FOLDER]


_made = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()
