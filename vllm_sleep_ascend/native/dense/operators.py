# SPDX-License-Identifier: Apache-2.0
"""torch_npu's operators with the parameters of vLLM's functions, and which of them are used."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")

_TOLERANCE = 1e-4  # of float32; a wrong result is further away
_ROTARY_MODES = {True: "half", False: "interleave"}  # by vLLM's is_neox_style

working: set[tuple[str, torch.dtype]] = set()
"""The operators that agree with PyTorch on this process's device, in the type of its engine."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]


def add_rms_norm(
    x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the sum, and the sum."""
    normalized, _, total = torch.ops.npu.npu_add_rms_norm(x, x_residual, weight, epsilon)
    return normalized, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.npu.npu_swiglu(x)


def rotate(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    rotary_dim: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``query`` and ``key`` are ``[tokens, heads * head_size]``."""
    return torch.ops.npu.npu_mrope(
        positions,
        query,
        key,
        cos_sin_cache,
        head_size,
        mrope_section=[0, 0, 0],
        rotary_mode=_ROTARY_MODES[is_neox_style],
    )


def can_norm(
    name: str, x: torch.Tensor, weight: torch.Tensor | None, variance_size: int | None
) -> bool:
    """Whether this norm takes these arguments."""
    return (
        (name, x.dtype) in working
        and variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.dim() >= 2
        and x.numel() > 0
    )


def can_activate(x: torch.Tensor) -> bool:
    return ("npu_swiglu", x.dtype) in working and x.is_contiguous() and x.numel() > 0


def can_rotate(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    rotary_dim: int,
    is_neox_style: bool,
) -> bool:
    unit = 16 if query.dtype == torch.float32 else 32
    return (
        (rotary_name(is_neox_style), query.dtype) in working
        and positions.dim() == 1
        and query.dim() == key.dim() == 2
        and head_size % unit == rotary_dim % unit == 0
        and query.numel() > 0
    )


def choose(device: torch.device, dtype: torch.dtype) -> None:
    """Try each operator once, and use those whose results are PyTorch's."""
    working.difference_update({(name, dtype) for name, *_ in _trials()})
    if envs.VLLM_BATCH_INVARIANT:
        logger.info("NPU: VLLM_BATCH_INVARIANT: PyTorch computes norms, activations and rotations")
        return
    for name, ours, plain, arguments in _trials():
        problem = _problem(ours, plain, arguments, device, dtype)
        if problem:
            logger.warning("NPU: %s is not used, and PyTorch computes instead: %s", name, problem)
        else:
            working.add((name, dtype))


def _problem(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    arguments: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """What is wrong with the operator; "" if nothing is."""
    on_device = [
        argument.to(device, dtype if argument.is_floating_point() else None)
        if isinstance(argument, torch.Tensor)
        else argument
        for argument in arguments
    ]
    try:
        results = _tuple(ours(*on_device))
    except (RuntimeError, AttributeError) as error:
        return str(error).strip().split("\n")[0]
    tolerance = max(_TOLERANCE, 8 * torch.finfo(dtype).eps)
    for got, want in zip(results, _tuple(plain(*arguments)), strict=True):
        difference = (got.cpu().float() - want).abs().max().item()
        if not difference <= tolerance:  # nor NaN
            return f"its results differ from PyTorch's by {difference:.2g}"
    return ""


def _trials() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    """Name, operator, PyTorch's version, and arguments in float32 on the host."""
    from vllm.ir.ops.layernorm import fused_add_rms_norm as plain_add_rms_norm
    from vllm.ir.ops.layernorm import rms_norm as plain_rms_norm
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    tokens, size = 3, 64
    x = torch.linspace(-1, 1, tokens * size).sin().view(tokens, size)
    residual, weight = x.flip(0).cos(), x[0] + 1
    yield "npu_rms_norm", rms_norm, plain_rms_norm.impls["native"].impl_fn, (x, weight, 1e-5)
    yield (
        "npu_add_rms_norm",
        add_rms_norm,
        plain_add_rms_norm.impls["native"].impl_fn,
        (x, residual, weight, 1e-5),
    )
    yield "npu_swiglu", silu_and_mul, SiluAndMul.forward_native, (x,)
    angles = torch.linspace(0, 3, 5 * size // 4).view(5, size // 4)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([4, 0, 2])
    for is_neox_style in (True, False):
        yield (
            rotary_name(is_neox_style),
            rotate,
            RotaryEmbedding.forward_static,
            (positions, x, residual[:, : size // 2], size // 2, size // 2, cache, is_neox_style),
        )


def rotary_name(is_neox_style: bool) -> str:
    return f"npu_mrope ({_ROTARY_MODES[is_neox_style]})"


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
