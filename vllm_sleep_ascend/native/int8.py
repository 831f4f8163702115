# SPDX-License-Identifier: Apache-2.0
"""Weight matrices as 8-bit integers with one scale per output channel."""

import torch
import torch.nn.functional as F

_STEPS = 127
# Integers are scaled down before a product, so that long sums do not overflow float16.
# A power of two is exact in every dtype.
_UNIT = 2.0**-7


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to int8.

    Args:
        weight: ``[..., outputs, inputs]``.

    Returns:
        The int8 weight, and float32 scales ``[..., outputs]`` for ``linear``.
    """
    largest = weight.abs().amax(dim=-1, keepdim=True).float()
    step = (largest / _STEPS).clamp_(min=torch.finfo(torch.float32).tiny)
    levels = (weight / step).round_().clamp_(-_STEPS, _STEPS).to(torch.int8)
    return levels, (step / _UNIT).squeeze(-1)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``F.linear``; with ``scale``, ``weight`` is int8 as ``quantize`` returns it."""
    if scale is None:
        return F.linear(x, weight, bias)
    out = F.linear(x, weight.to(x.dtype).mul_(_UNIT)) * scale
    return (out if bias is None else out + bias).to(x.dtype)
