# SPDX-License-Identifier: Apache-2.0
"""The process that loads AscendCL and probes: it answers one question at a time.

The first request for a device sets it; the end of the process resets it.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypedDict

from vllm_sleep_ascend.doctor.acl import Acl, AclError, AclMissing
from vllm_sleep_ascend.doctor.finding import Finding, of_call
from vllm_sleep_ascend.doctor.probes import PROBES, run
from vllm_sleep_ascend.doctor.probes.base import Device

_END_S = 5.0
_KILLED_S = 2.0  # a killed process ends at once, unless it hangs in the driver
_ALLOCATOR = "vllm_sleep_ascend._camem"
_PR_SET_PDEATHSIG = 1
_PYTHON_OPTIONS = ("-S",) * sys.flags.no_site  # so that the child finds the same packages


class Silence(Exception):
    """The child did not answer in time, and was killed."""


class Crash(Exception):
    """The child ended; the text says how, and what it printed last."""


class Seen(TypedDict):
    """What AscendCL says. ``devices`` has the device that was asked about, if there is one: its
    free and total bytes, or its error."""

    soc: str
    acl_version: str
    count: int
    devices: list[dict[str, Any]]


class Child:
    """The parent's side. A child that hung or crashed is replaced at the next request.

    No wait goes beyond ``latest``, a time of ``time.monotonic()``. A process that hangs in the
    driver cannot be killed, and is left behind.
    """

    def __init__(self, latest: float = math.inf) -> None:
        self._process: subprocess.Popen | None = None
        self._latest = latest

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def look(self, timeout_s: float, device: int) -> Seen:
        """
        Raises:
            Silence, Crash: there is no answer.
            AclMissing, AclError: AscendCL does not work.
        """
        return self._ask(timeout_s, "look", device)

    def probe(self, timeout_s: float, name: str, device: int, size: int) -> Finding:
        """
        Raises:
            Silence, Crash: there is no answer.
            AclMissing, AclError: the device cannot be used.
        """
        return self._ask(timeout_s, "probe", name, device, size)

    def _ask(self, timeout_s: float, *question: Any) -> Any:
        timeout_s = self._at_most(timeout_s)
        process = self._process or self._start()
        try:
            self._connection.send(question)
            answer = self._connection.recv() if self._connection.poll(timeout_s) else None
        except (EOFError, OSError):
            raise self._crash(process) from None
        if answer is None:
            self.kill()
            raise Silence(f"did not answer in {timeout_s:g} s")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Ask the child to reset its device and exit, and kill it if it does not."""
        if self._process is None:
            return
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._at_most(_END_S))
        self.kill()

    def kill(self) -> None:
        """Kill the child; the driver frees what it holds of the device."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        try:
            process.wait(max(0.1, self._at_most(_KILLED_S)))
        except subprocess.TimeoutExpired:
            print(f"vllm-sleep: process {process.pid} does not end", file=sys.stderr)
        self._connection.close()
        self._output.close()

    def _at_most(self, seconds: float) -> float:
        return max(0.0, min(seconds, self._latest - time.monotonic()))

    def _start(self) -> subprocess.Popen:
        self._connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (kill closes it)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *_PYTHON_OPTIONS, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            )
        return self._process

    def _crash(self, process: subprocess.Popen) -> Crash:
        try:
            code: int | None = process.wait(self._at_most(_END_S))
        except subprocess.TimeoutExpired:
            code = None
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        self.kill()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Crash(f"the process ended with {how}" + (f": {lines[-1]}" if lines else ""))


class Answers:
    """The child's side."""

    def __init__(self) -> None:
        self._acl: Acl | None = None
        self._current: int | None = None

    def look(self, device: int) -> Seen:
        acl = self._open()
        count = acl.device_count()
        return {
            "soc": acl.soc(),
            "acl_version": acl.version(),
            "count": count,
            "devices": [self._memory(acl, device)] if device < count else [],
        }

    def _memory(self, acl: Acl, device: int) -> dict[str, Any]:
        try:
            acl.set_device(device)
            try:
                free, total = acl.free_and_total()
            finally:
                acl.reset_devices()
        except AclError as error:
            return {"device": device, "error": str(error), **of_call(error)}
        return {"device": device, "free_bytes": free, "total_bytes": total}

    def probe(self, name: str, index: int, size: int) -> Finding:
        acl = self._open()
        if self._current != index:
            acl.set_device(index)
            self._current = index
        unit = acl.granularity(index)
        probe = next(probe for probe in PROBES if probe.name == name)
        return run(probe, Device(acl, index, unit, max(unit, size // unit * unit)))

    def _open(self) -> Acl:
        self._acl = self._acl or Acl()
        return self._acl

    def close(self) -> None:
        """Reset the device, unless the allocator was used: it keeps streams until the process ends,
        and a reset would destroy them. The end of the process frees everything as well."""
        if self._acl is None or _ALLOCATOR in sys.modules:
            return
        self._acl.reset_devices()
        self._acl.call("aclFinalize")


def main() -> None:
    # If the parent is killed, a call that hangs must not hold the device for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = Answers()
    with Connection(int(sys.argv[1])) as connection:
        while True:
            try:
                method, *arguments = connection.recv()
            except EOFError:
                break
            try:
                answer = getattr(answers, method)(*arguments)
            except (AclMissing, AclError) as error:
                answer = error
            connection.send(answer)
    answers.close()


if __name__ == "__main__":
    main()
