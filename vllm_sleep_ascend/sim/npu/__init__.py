# SPDX-License-Identifier: Apache-2.0
"""torch_npu's own operators on the simulated device.

Each is written in PyTorch's operators, after torch_npu's documentation of it, in float32 inside.
What is documented and not simulated is refused by name.
"""

import warnings

import torch

from . import attention, dense, moe

_registrations: list[torch.library.Library] = []


def register() -> None:
    """Take the place of torch_npu's kernels, until the process ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each of them replaces a kernel, on purpose
        for module in (dense, attention, moe):
            for name, kernel in module.KERNELS.items():
                namespace, operator = name.split("::")
                library = torch.library.Library(namespace, "IMPL")
                library.impl(operator, kernel, "PrivateUse1", allow_override=True)
                _registrations.append(library)


def define_vllm_ascend() -> None:
    """Define the operators of vllm-ascend's own library that it calls even without the library."""
    for name, (schema, kernel) in moe.VLLM_ASCEND_SCHEMAS.items():
        namespace, operator = name.split("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(operator + schema)
        library.impl(operator, kernel, "PrivateUse1")
        _registrations.append(library)
