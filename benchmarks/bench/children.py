# SPDX-License-Identifier: Apache-2.0
"""Each allocator is measured in a process of its own: the same script, with ``--child NAME``."""

import json
import os
import subprocess
import sys
from typing import Any, NoReturn

from bench import build


def environment_for(device: str) -> dict[str, str]:
    """The children's, with a device as large as the real one. Builds the allocator for CUDA."""
    environment = dict(os.environ)
    if device == "cuda":
        build.build()
        environment.setdefault("NPU_SIM_HBM_GIB", str(build.device_gib() - 3))
    return environment


def run_each(names: str, environment: dict[str, str]) -> dict[str, Any]:
    """What each of these, with commas between them, has measured, or its error."""
    runs: dict[str, Any] = {}
    for name in filter(None, names.split(",")):
        command = [sys.executable, *sys.argv, "--child", name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            runs[name] = json.loads(done.stdout.splitlines()[-1])
        else:
            tail = done.stdout.strip()[-200:]
            runs[name] = {"error": f"exit code {done.returncode}: {tail}"}
        print(f"{name}: {json.dumps(runs[name])}", flush=True)
    return runs


def end_child(result: dict[str, Any]) -> NoReturn:
    """Give the parent the result, and end: the process's exit is not measured."""
    print(json.dumps(result), flush=True)
    os._exit(0)


def check(runs: dict[str, Any]) -> None:
    """
    Raises:
        SystemExit: an allocator failed, or lost contents.
    """
    if any("error" in run or not run["contents_kept"] for run in runs.values()):
        raise SystemExit("an allocator failed, or lost contents")
