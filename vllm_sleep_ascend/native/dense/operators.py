# SPDX-License-Identifier: Apache-2.0
"""torch_npu's operators with the parameters of vLLM's functions, and which of them are used."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")

CHIPS = ("Ascend910B", "Ascend910_93")
"""Those for which the operators are documented: Atlas A2 and A3."""

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
        and weight.dim() == 1
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
    return (
        (rotary_name(is_neox_style), query.dtype) in working
        and positions.dim() == 1
        and query.dim() == key.dim() == 2
        and query.shape[0] == key.shape[0] == positions.shape[0] > 0
        and _is_aligned(head_size, query.dtype)
        and _is_aligned(rotary_dim, query.dtype)
    )


def _is_aligned(elements: int, dtype: torch.dtype) -> bool:
    """Whether npu_mrope takes heads, or their rotated part, of that many elements."""
    return elements % (16 if dtype == torch.float32 else 32) == 0


def choose(device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """Try each operator, and use those whose results are PyTorch's.

    Args:
        device: this process's NPU.
        dtype: what the engine computes in.
        head_size: elements of an attention head of its model.
    """
    working.difference_update([tried for tried in working if tried[1] == dtype])
    chip = current_platform.get_device_name(device.index)
    if not chip.startswith(CHIPS):
        logger.info("NPU: PyTorch computes norms, activations and rotations on %s", chip)
        return
    if envs.VLLM_BATCH_INVARIANT:
        logger.info("NPU: VLLM_BATCH_INVARIANT: PyTorch computes norms, activations and rotations")
        return
    problems: dict[str, str] = {}
    for name, ours, plain, arguments in _trials(device, dtype, head_size):
        problems[name] = problems.get(name) or problem_of(ours, plain, arguments)
    for name, problem in problems.items():
        if problem:
            logger.warning("NPU: %s is not used, and PyTorch computes instead: %s", name, problem)
        else:
            working.add((name, dtype))


def problem_of(
    ours: Callable[..., Any], plain: Callable[..., Any], arguments: tuple[Any, ...]
) -> str:
    """What is wrong with the operator; "" if nothing is."""
    on_host = [
        (argument.cpu().float() if argument.is_floating_point() else argument.cpu())
        if isinstance(argument, torch.Tensor)
        else argument
        for argument in arguments
    ]
    wanted = _tuple(plain(*on_host))
    try:
        results = [result.cpu() for result in _tuple(ours(*arguments))]
    except (RuntimeError, AttributeError) as error:
        return str(error).strip().split("\n")[0] or repr(error)
    for got, want in zip(results, wanted, strict=True):
        difference = (got.float() - want).abs().max().item()
        if not difference <= max(_TOLERANCE, 8 * torch.finfo(got.dtype).eps):  # nor NaN
            return f"its results differ from PyTorch's by {difference:.2g}"
    return ""


def _trials(
    device: torch.device, dtype: torch.dtype, head_size: int
) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    """Name, operator, PyTorch's version, and arguments as a model gives them: query and key are
    parts of wider rows."""
    from vllm.ir.ops.layernorm import fused_add_rms_norm as plain_add_rms_norm
    from vllm.ir.ops.layernorm import rms_norm as plain_rms_norm
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    tokens, heads = 3, 4
    rows = torch.linspace(-1, 1, tokens * heads * head_size).sin().view(tokens, heads * head_size)
    rows, residual = rows.to(device, dtype), rows.flip(0).cos().to(device, dtype)
    query, key = rows[:, : 2 * head_size], rows[:, 2 * head_size : 3 * head_size]
    weight = (residual[0] + 1).contiguous()
    norm, add_norm = plain_rms_norm.impls["native"], plain_add_rms_norm.impls["native"]
    by_head = query.unflatten(-1, (2, head_size))
    yield "npu_rms_norm", rms_norm, norm.impl_fn, (rows, weight, 1e-5)
    yield "npu_rms_norm", rms_norm, norm.impl_fn, (by_head, weight[:head_size], 1e-5)
    yield "npu_add_rms_norm", add_rms_norm, add_norm.impl_fn, (rows, residual, weight, 1e-5)
    yield "npu_swiglu", silu_and_mul, SiluAndMul.forward_native, (rows,)
    positions = torch.tensor([4, 0, 2], device=device)
    for rotary_dim in (head_size, head_size // 2):
        if not (_is_aligned(head_size, dtype) and _is_aligned(rotary_dim, dtype)):
            continue
        angles = torch.linspace(0, 3, 5 * rotary_dim // 2).view(5, rotary_dim // 2)
        cache = torch.cat((angles.cos(), angles.sin()), -1).to(device, dtype)
        for is_neox_style in (True, False):
            yield (
                rotary_name(is_neox_style),
                rotate,
                RotaryEmbedding.forward_static,
                (positions, query, key, head_size, rotary_dim, cache, is_neox_style),
            )


def rotary_name(is_neox_style: bool) -> str:
    return f"npu_mrope ({_ROTARY_MODES[is_neox_style]})"


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
