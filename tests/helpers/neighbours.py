# SPDX-License-Identifier: Apache-2.0
"""Other processes on the device of a starting engine, and the steps of its start.

With ``--worker-extension-cls helpers.neighbours.StopsAtMoments`` a test can stop a server's start:
at each step in ``STOP_MOMENTS`` a file with its name appears in ``STOP_FOLDER``, and the start
continues when the test removes the file.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

_NEIGHBOUR = """
from helpers.ascendcl import *
ok("aclrtSetDevice", 0)
pieces = []
for line in sys.stdin:
    wanted = int(line)
    code = SUCCESS
    while len(pieces) < wanted and code == SUCCESS:
        code, handle = malloc_physical(HUGE)
        pieces += [handle] if code == SUCCESS else []
    while len(pieces) > wanted:
        ok("aclrtFreePhysical", pieces.pop())
    print(len(pieces), flush=True)
"""


class Neighbour:
    """A process that holds a given amount of memory of device 0."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys{_NEIGHBOUR}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hold(self, mib: int) -> None:
        """Allocate or free until it holds this many MiB (an even number)."""
        assert self._tell(mib // 2) == mib // 2

    def take_all(self) -> None:
        """Allocate all free memory."""
        self._tell(1 << 20)

    def _tell(self, pieces: int) -> int:
        assert self._process.stdin and self._process.stdout
        print(pieces, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def wrap_start(hook: Callable[[str], None], replace: Callable[[Any, str, Any], None]) -> None:
    """Call ``hook`` at each step of a start in this process, with its name: "before load_model" …

    ``replace`` sets an attribute, as ``monkeypatch.setattr`` does.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    beside_vllm_ascend = importlib.util.find_spec("vllm_ascend") is not None
    if beside_vllm_ascend:
        from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

        from vllm_sleep_ascend.beside.worker import SleepingNPUWorker as NPUWorker
    else:
        from vllm_sleep_ascend.native.model_runner import NPUModelRunner
        from vllm_sleep_ascend.native.worker import NPUWorker

    def wrapped(name: str, stock: Callable) -> Callable:
        @wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            hook(f"before {name}")
            result = stock(*args, **kwargs)
            hook(f"after {name}")
            return result

        return call

    for owner, name in (
        (NPUWorker, "init_device"),
        (NPUWorker, "_init_device" if beside_vllm_ascend else "_init_workspace_and_model_runner"),
        (NPUModelRunner, "load_model"),
        (DefaultModelLoader, "load_weights"),
        (NPUModelRunner, "profile_run"),
        (NPUModelRunner, "_dummy_run"),
        (NPUWorker, "determine_available_memory"),
        (NPUWorker, "_run_largest_graph"),
        (NPUWorker, "initialize_from_config"),
        (NPUModelRunner, "initialize_kv_cache_tensors"),
        (NPUWorker, "compile_or_warm_up_model"),
    ):
        replace(owner, name, wrapped(name, getattr(owner, name)))


class StopsAtMoments:
    """Adds nothing to a worker. It exists so that the worker's process imports this module."""


def _stop(moment: str) -> None:
    if moment in os.environ["STOP_MOMENTS"].split(","):
        file = Path(os.environ["STOP_FOLDER"]) / moment
        file.touch()
        while file.exists():
            time.sleep(0.01)


if "STOP_FOLDER" in os.environ:
    wrap_start(_stop, setattr)
