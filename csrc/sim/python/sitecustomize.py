# SPDX-License-Identifier: Apache-2.0
"""The kernel that Python programs of the simulated machine see: NPU_SIM_KERNEL. And what lets
torch_npu run beside torch's CUDA build.

Python runs this file at its start, and this file runs the next sitecustomize on the path.
"""

import ctypes
import os
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HERE = str(Path(__file__).parent)


def _run_the_next() -> None:
    elsewhere = [folder for folder in sys.path if folder != _HERE]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


def _pretend(kernel: str) -> None:
    release = kernel if kernel.count(".") > 1 else f"{kernel}.0"
    system, node, _, version, machine = os.uname()
    result = os.uname_result((system, node, release, version, machine))
    os.uname = lambda: result


def _tolerate_cuda() -> None:
    library = Path(os.environ.get("ASCEND_HOME_PATH", "/")) / "lib64/libnpu_sim_torch_with_cuda.so"
    with suppress(OSError):  # a toolkit without it, or of another machine
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


_pretend(os.environ.get("NPU_SIM_KERNEL") or "5.10")
_tolerate_cuda()
_run_the_next()
