# SPDX-License-Identifier: Apache-2.0
"""Operators of a dense model's layers: norms, activation, rotary embedding."""

import os

import torch
import torch.nn.functional as F

from vllm_sleep_ascend.sim.npu.require import require


def _require_not_310p(operator: str) -> None:
    soc = os.environ.get("NPU_SIM_SOC", "910B")
    require(not soc.startswith("310P"), operator, f"not supported on {soc}")


def _require_last(operator: str, x: torch.Tensor, gamma: torch.Tensor) -> None:
    last = x.shape[x.dim() - gamma.dim() :]
    require(last == gamma.shape, operator, f"gamma {gamma.shape} for the last dimensions {last}")


def rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """``input / rms * gamma`` over gamma's dimensions, and ``1 / rms`` in float32."""
    require(input.dim() >= 2, "npu_rms_norm", f"input of {input.dim()} dimensions")
    _require_last("npu_rms_norm", input, gamma)
    require(
        gamma.dtype in (input.dtype, torch.float32),
        "npu_rms_norm",
        f"input is {input.dtype} and gamma {gamma.dtype}",
    )
    return _normalize(input, gamma, epsilon)


def _normalize(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dims = tuple(range(-gamma.dim(), 0))
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


def add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of ``x1 + x2``, ``1 / rms``, and the sum."""
    _require_last("npu_add_rms_norm", x1, gamma)
    require(x1.shape == x2.shape, "npu_add_rms_norm", f"x1 {x1.shape} and x2 {x2.shape}")
    require(x1.numel() > 0, "npu_add_rms_norm", "empty tensors are not taken")
    require(
        x1.dtype == x2.dtype == gamma.dtype,
        "npu_add_rms_norm",
        f"x1 is {x1.dtype}, x2 {x2.dtype} and gamma {gamma.dtype}",
    )
    x = x1 + x2
    return *_normalize(x, gamma, epsilon), x


def add_rms_norm_bias(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of ``x1 + x2`` plus ``beta``, ``1 / rms``, and the sum."""
    x = x1 + x2
    y, rstd = _normalize(x, gamma, epsilon)
    return y if beta is None else y + beta, rstd, x


def swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """``silu(a) * b`` of the two halves along ``dim``."""
    _require_not_310p("npu_swiglu")
    require(input.is_contiguous(), "npu_swiglu", "input is not contiguous")
    require(input.numel() > 0, "npu_swiglu", "empty tensors are not taken")
    a, b = input.float().chunk(2, dim)
    return (F.silu(a) * b).to(input.dtype)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
) -> None:
    """Rotate query and key in place: the halves of a head (neox), or adjacent pairs."""
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, -1)
    rotated = 2 * cos.shape[-1]
    for tensor in (query, key):
        heads = tensor.view(len(positions), -1, head_size)[..., :rotated]
        x = heads.float()
        a, b = x.chunk(2, -1) if is_neox_style else (x[..., ::2], x[..., 1::2])
        turned = (a * cos - b * sin, b * cos + a * sin)
        joined = torch.cat(turned, -1) if is_neox_style else torch.stack(turned, -1).flatten(-2)
        heads.copy_(joined)


def mrope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key, (tokens, heads * size), rotated: halves of a head, or neighbours."""
    name = "npu_mrope"
    _require_not_310p(name)
    require(not any(mrope_section or ()), name, f"mrope_section {mrope_section} is not simulated")
    require(cache_mode == "default", name, f"cache_mode {cache_mode} without sections")
    require(rotary_mode in ("half", "interleave"), name, f"rotary_mode {rotary_mode}")
    require(positions.dim() == 1, name, f"positions of {positions.dim()} dimensions")
    require(positions.dtype in (torch.int32, torch.int64), name, f"positions {positions.dtype}")
    require(query.dim() == key.dim() == cos_sin_cache.dim() == 2, name, "not of 2 dimensions")
    require(query.dtype == key.dtype == cos_sin_cache.dtype, name, "types differ")
    unit, rotary = (16 if query.dtype == torch.float32 else 32), cos_sin_cache.shape[1]
    require(
        head_size % unit == 0 and rotary % unit == 0 and rotary <= head_size,
        name,
        f"{rotary} of {head_size} elements of a head turn, not multiples of {unit}",
    )
    turned, key_turned = (t.clone(memory_format=torch.contiguous_format) for t in (query, key))
    neox = rotary_mode == "half"
    rotary_embedding(positions, turned, key_turned, head_size, cos_sin_cache, neox)
    return turned, key_turned


def matmul_add_fp32(x: torch.Tensor, weight: torch.Tensor, C: torch.Tensor) -> None:
    """``C += x.T @ weight``, in float32."""
    C.add_(x.float().T @ weight.float())


KERNELS = {
    "npu::npu_rms_norm": rms_norm,
    "npu::npu_add_rms_norm": add_rms_norm,
    "npu::npu_swiglu": swiglu,
    "npu::npu_mrope": mrope,
    "atb::_npu_rotary_embedding": rotary_embedding,
    "atb::_npu_matmul_add_fp32": matmul_add_fp32,
}

VLLM_ASCEND = {
    "_C_ascend::npu_add_rms_norm_bias": (
        "(Tensor x1, Tensor x2, Tensor gamma, Tensor? beta=None, float epsilon=1e-6) -> "
        "(Tensor y, Tensor rstd, Tensor x)",
        add_rms_norm_bias,
        add_rms_norm_bias,
    ),
}
"""Operators of vllm-ascend's library: schema, kernel and meta kernel."""
