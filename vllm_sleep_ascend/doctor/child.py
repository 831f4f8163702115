# SPDX-License-Identifier: Apache-2.0
"""The process that loads AscendCL and probes: it answers questions, one line of JSON each.

A device is set by the first question about it, and given back at the end.
"""

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from select import select
from typing import Any

from vllm_sleep_ascend.doctor.acl import Acl, AclError, AclMissing
from vllm_sleep_ascend.doctor.probes import PROBES, run
from vllm_sleep_ascend.doctor.probes.base import Device

_END_S = 5.0
_KILLED_S = 2.0  # one that is killed ends at once, or hangs in the driver
_ALLOCATOR = "vllm_sleep_ascend._camem"
_PR_SET_PDEATHSIG = 1
_PYTHON_OPTIONS = ("-S",) * sys.flags.no_site  # the child finds the same packages


class Silence(Exception):
    """The child did not answer in time, and was killed."""


class Crash(Exception):
    """The child ended; the text says how, and what it printed last."""


class Child:
    """The parent's side. One that did not answer or crashed is replaced at the next question.

    Nothing is waited for beyond ``latest``, a moment of ``time.monotonic()``: a process that hangs
    in the driver cannot be killed, and is left behind.
    """

    def __init__(self, latest: float = math.inf) -> None:
        self._process: subprocess.Popen | None = None
        self._latest = latest

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def ask(self, timeout_s: float, **question: Any) -> dict[str, Any]:
        """
        Raises:
            Silence, Crash: there is no answer.
        """
        timeout_s = self._at_most(timeout_s)
        process = self._process or self._start()
        end = time.monotonic() + timeout_s
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._crash() from None
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select([self._answers], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.kill()
                raise Silence(f"did not answer in {timeout_s:g} s")
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise self._crash()
            line += part
        return json.loads(line)

    def end(self) -> None:
        """Let it give back its device and exit; kill it if it does not."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(self._at_most(_END_S))
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        """What it holds of the device comes back with its end."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        try:
            process.wait(max(0.1, self._at_most(_KILLED_S)))
        except subprocess.TimeoutExpired:
            print(f"vllm-sleep: process {process.pid} does not end", file=sys.stderr)
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(OSError):
                process.stdin.close()
        os.close(self._answers)
        self._output.close()

    def _at_most(self, seconds: float) -> float:
        return max(0.0, min(seconds, self._latest - time.monotonic()))

    def _start(self) -> subprocess.Popen:
        self._answers, write = os.pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (kill closes it)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_PYTHON_OPTIONS, "-m", __name__, str(write)],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[write],
                env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            )
        finally:
            os.close(write)
        return self._process

    def _crash(self) -> Crash:
        assert self._process is not None
        try:
            code: int | None = self._process.wait(self._at_most(_END_S))
        except subprocess.TimeoutExpired:
            code = None
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        self.kill()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Crash(f"the process ended with {how}" + (f": {lines[-1]}" if lines else ""))


class _Answers:
    """The child's side."""

    def __init__(self) -> None:
        self._acl: Acl | None = None
        self._current: int | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            if question["ask"] == "look":
                return self._look(question["device"])
            return self._probe(question["name"], question["device"], question["size"])
        except AclMissing as error:
            return {"missing": str(error)}
        except AclError as error:
            return {"error": str(error), "call": error.call, "code": error.code}

    def _look(self, device: int) -> dict[str, Any]:
        """What AscendCL says, and the free and total memory of the device, if there is one."""
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
            return {"device": device, "error": str(error), "call": error.call, "code": error.code}
        return {"device": device, "free_bytes": free, "total_bytes": total}

    def _probe(self, name: str, index: int, size: int) -> dict[str, Any]:
        acl = self._open()
        if self._current != index:
            acl.set_device(index)
            self._current = index
        unit = acl.granularity(index)
        probe = next(probe for probe in PROBES if probe.name == name)
        device = Device(acl, index, unit, max(unit, size // unit * unit))
        return asdict(run(probe, device))

    def _open(self) -> Acl:
        self._acl = self._acl or Acl()
        return self._acl

    def close(self) -> None:
        """Reset the device, unless the allocator was used: it keeps streams until the process ends,
        and a reset would destroy them. The end of the process gives all back as well."""
        if self._acl is None or _ALLOCATOR in sys.modules:
            return
        self._acl.reset_devices()
        self._acl.call("aclFinalize")


def main() -> None:
    # A call that hangs would hold the device for ever if the parent were killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = _Answers()
    out = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        print(json.dumps(answers.answer(json.loads(line))), file=out, flush=True)
    answers.close()


if __name__ == "__main__":
    main()
