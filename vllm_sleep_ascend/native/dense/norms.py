# SPDX-License-Identifier: Apache-2.0
"""The norms as kernels of vLLM's IR, which asks each time whether they take the arguments."""

import torch
from vllm.ir import ops

from vllm_sleep_ascend.native.dense import operators

PROVIDER = "torch_npu"


def _takes(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return operators.can_norm("npu_rms_norm", x, weight, variance_size)


def _takes_with_residual(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    same = x_residual.dtype == x.dtype and x_residual.shape == x.shape
    return same and operators.can_norm("npu_add_rms_norm", x, weight, variance_size)


@ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)
def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> torch.Tensor:
    return operators.rms_norm(x, weight, epsilon)


@ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_with_residual)
def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return operators.add_rms_norm(x, x_residual, weight, epsilon)
