# SPDX-License-Identifier: Apache-2.0
"""torch_npu's own operators on the simulated device.

Each is written in PyTorch's operators for tensors of the CPU, after torch_npu's documentation of
it, in float32 inside. The simulator lets it serve the device, at once or in a graph. What is
documented and not simulated is refused by name.
"""

import ctypes
import warnings
from pathlib import Path

import torch

from . import attention, dense, moe

_registrations: list[torch.library.Library] = []


def register(operators: Path) -> None:
    """Take the place of torch_npu's kernels, until the process ends.

    Args:
        operators: the simulator's library, which serves the device.
    """
    for module in (dense, attention, moe):
        for name, kernel in module.KERNELS.items():
            namespace, operator = name.split("::")
            library = torch.library.Library(namespace, "IMPL")
            library.impl(operator, kernel, "CPU", allow_override=True)
            _registrations.append(library)
            _serve(operators, name)


def define_vllm_ascend(operators: Path) -> None:
    """Define the operators of vllm-ascend's own library that it calls even without the library."""
    for name, (schema, kernel) in moe.VLLM_ASCEND_SCHEMAS.items():
        namespace, operator = name.split("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(operator + schema)
        library.impl(operator, kernel, "CPU")
        _registrations.append(library)
        _serve(operators, name)


def _serve(operators: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it replaces torch_npu's kernel, on purpose
        if ctypes.CDLL(str(operators)).npuSimServeOnCpu(name.encode()) != 0:
            raise RuntimeError(f"{name} has no kernel of the CPU")
