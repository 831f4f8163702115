# SPDX-License-Identifier: Apache-2.0
"""torch_npu's own operators on the simulated device.

Each is written in PyTorch's operators for tensors of the CPU, after torch_npu's documentation of
it, in float32 inside. The simulator lets it serve the device, at once or in a graph. What is
documented and not simulated is refused by name.
"""

import ctypes
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_sleep_ascend.sim.npu import attention, dense, moe

_NOT_SIMULATED = (
    "get_masked_input_and_mask(Tensor input, int org_vocab_start_index, int org_vocab_end_index, "
    "int num_org_vocab_padding, int added_vocab_start_index, int added_vocab_end_index) -> "
    "(Tensor masked_input, Tensor mask)",
    "bgmv_expand(Tensor! x, Tensor! weight, Tensor! indices, Tensor! y, int slice_offset, "
    "int slice_size) -> Tensor",
    "sgmv_expand(Tensor! x, Tensor! weight, Tensor! lora_indices, Tensor! seq_len, Tensor! y, "
    "int slice_offset, int slice_size) -> Tensor",
)
"""Of vllm-ascend's own library, without kernels: it looks for them when it loads the library."""

_registrations: list[torch.library.Library] = []


def register(operators: Path) -> None:
    """Take the place of torch_npu's kernels, until the process ends.

    Args:
        operators: the simulator's library, which serves the device.
    """
    for module in (dense, attention, moe):
        for name, kernel in module.KERNELS.items():
            _implement(name, kernel, "CPU")
            _serve(operators, name)
    for name, meta in attention.METAS.items():
        _implement(name, meta, "Meta")
    for name, function in attention.ON_HOST.items():
        _implement(name, function, "PrivateUse1")


def define_vllm_ascend(operators: Path) -> None:
    """Define the operators of vllm-ascend's own library that it calls, without the library."""
    library = torch.library.Library("_C_ascend", "FRAGMENT")
    _registrations.append(library)
    for schema in _NOT_SIMULATED:
        library.define(schema)
    for module in (dense, moe):
        for name, (schema, kernel, meta) in module.VLLM_ASCEND.items():
            library.define(name.split("::")[1] + schema)
            _implement(name, kernel, "CPU")
            _implement(name, meta, "Meta")
            _serve(operators, name)


def _implement(name: str, function: Callable[..., Any], key: str) -> None:
    namespace, operator = name.split("::")
    library = torch.library.Library(namespace, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it replaces torch_npu's kernel, on purpose
        library.impl(operator, function, key, allow_override=True)
    _registrations.append(library)


def _serve(operators: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ctypes.CDLL(str(operators)).npuSimServeOnCpu(name.encode()) != 0:
            raise RuntimeError(f"{name} has no kernel of the CPU")
