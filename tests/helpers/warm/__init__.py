# SPDX-License-Identifier: Apache-2.0
"""Processes that start with vLLM imported, which saves each of them ten seconds of CPU time.

A fork server (``multiprocessing.forkserver``) imports torch, torch_npu and vLLM once, and opens no
device. ``WarmProcess`` runs a Python command line in a fork of it. What that command spawns with
``multiprocessing`` is forked from a second server in which only the imports have been done. After
``start``, the ranks of an engine in this process are forked like that too.

Otherwise nothing changes: the command has its own session, working directory, environment and
output, has its own process id, and exits like an interpreter.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from helpers.patience import patience
from helpers.warm import spawning

_PRELOAD = "helpers.warm.preload"


def start() -> None:
    """Start this process's fork server if there is none, without waiting for it."""
    if forkserver._forkserver._forkserver_pid is None:
        spawning.install()
        multiprocessing.set_forkserver_preload([_PRELOAD])
        forkserver.ensure_running()


class WarmProcess:
    """``python *command`` with vLLM imported, and the parts of ``subprocess.Popen`` that tests use.

    ``command`` begins with ``-m MODULE`` or with the path of a script; both outputs go to ``log``.
    """

    def __init__(
        self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        from helpers.warm.command import run

        start()
        environment = dict(os.environ if env is None else env)
        self.args = [str(argument) for argument in command]
        self._process = multiprocessing.get_context("spawn").Process(
            target=run, args=(self.args, environment, os.getcwd(), str(log))
        )
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode


class ColdProcess(subprocess.Popen):
    """The same in a new interpreter with nothing imported."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        with log.open("a") as out:
            super().__init__(
                [sys.executable, *map(str, command)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


if importlib.util.find_spec("vllm_ascend") is not None:
    WarmProcess = ColdProcess  # type: ignore[assignment,misc]  # another platform, another vLLM


def run(
    command: Sequence[str | Path],
    log: Path,
    seconds: float,
    env: Mapping[str, str] | None = None,
    cold: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run the command with stdout and stderr merged, and kill everything that it leaves running.

    Raises:
        subprocess.TimeoutExpired: it has not ended within ``seconds`` times the patience.
    """
    process = (ColdProcess if cold else WarmProcess)(command, log, env)
    try:
        code = process.wait(seconds * patience())
    finally:
        kill_group(process.pid)
    return subprocess.CompletedProcess(process.args, code, log.read_text(errors="replace"))


def kill_group(leader: int) -> None:
    """Kill a group leader and its whole group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
