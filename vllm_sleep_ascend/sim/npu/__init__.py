# SPDX-License-Identifier: Apache-2.0
"""torch_npu's custom operators on the simulated device.

Each follows torch_npu's documentation, is written with PyTorch's CPU operators, and computes in
float32. The simulator runs it on device tensors, at once or in a graph. Documented arguments that
are not simulated are refused by name.
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
"""Operators without kernels: vllm-ascend looks them up when it loads its library."""

_registrations: list[torch.library.Library] = []


def register(operators: Path) -> None:
    """Replace torch_npu's kernels until the process ends.

    Args:
        operators: the simulator's library, which runs CPU kernels on device tensors.
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
    """Define the operators of vllm-ascend's library, without the library itself."""
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
        warnings.simplefilter("ignore")  # replacing torch_npu's kernel is intended
        library.impl(operator, function, key, allow_override=True)
    _registrations.append(library)


def _serve(operators: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ctypes.CDLL(str(operators)).npuSimServeOnCpu(name.encode()) != 0:
            raise RuntimeError(f"{name} has no CPU kernel")
