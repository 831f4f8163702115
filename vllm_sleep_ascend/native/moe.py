# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers in plain PyTorch.

Importing this module registers the experts as out-of-tree operators of vLLM, replaces the router's
compiled top-k kernels, and leaves torch.compile out of the router that chooses groups of experts
(DeepSeek).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.router import (
    fused_topk_bias_router,
    fused_topk_router,
    grouped_topk_router,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm_sleep_ascend.native.int8 import linear

_GATES: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    weigh_input: bool = False,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of each token's chosen experts.

    Tokens are sorted by expert, so each expert runs once over all of its tokens. The counts are
    read on the host, which costs one synchronisation per layer.

    Args:
        x: ``[tokens, hidden]``.
        gate_up: ``[experts, 2 * inner, hidden]``.
        down: ``[experts, hidden, inner]``.
        weights: ``[tokens, chosen]``.
        ids: ``[tokens, chosen]``; negative entries (another rank's experts) are skipped.
        gate: applied to the first half of the inner values.
        gate_up_bias: ``[experts, 2 * inner]``.
        down_bias: ``[experts, hidden]``.
        weigh_input: apply the weights to the input instead of the output.
        gate_up_scale: ``[experts, 2 * inner]``, if ``gate_up`` is int8.
        down_scale: ``[experts, hidden]``, if ``down`` is int8.

    Returns:
        ``[tokens, hidden]`` in ``x``'s dtype; sums in float32.
    """
    num_experts, chosen = gate_up.shape[0], ids.shape[1]
    # Negative ids sort as one extra expert, which contributes nothing.
    flat = torch.where(ids < 0, num_experts, ids).flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
    rows = x.index_select(0, order // chosen)
    weights = weights.flatten().index_select(0, order).unsqueeze(1).float()
    if weigh_input:
        rows = (rows * weights).to(x.dtype)
    results = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        here = slice(start, start + count)
        mine: list[Any]
        mine = [None if t is None else t[expert] for t in (gate_up, gate_up_bias, gate_up_scale)]
        left, right = linear(rows[here], *mine).chunk(2, dim=-1)
        mine = [None if t is None else t[expert] for t in (down, down_bias, down_scale)]
        part = linear(gate(left) * right, *mine)
        results[here] = part.float() if weigh_input else part * weights[here]
        start += count
    scattered = torch.empty_like(results).index_copy_(0, order, results)
    return scattered.view(x.shape[0], chosen, -1).sum(dim=1).to(x.dtype)


def _choose(
    scores: torch.Tensor,
    like: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None,
    factor: float = 1.0,
) -> tuple[Any, Any]:
    """A bias counts for the choice, not for the weights."""
    choice = scores if bias is None else scores + bias.float()
    ids = choice.topk(like.shape[-1], dim=-1).indices
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * factor, ids.to(like.dtype)


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Weights and ids ``[tokens, chosen]`` of the top experts. The signature is vLLM's."""
    scores = gating_output.float().softmax(dim=-1)
    return _choose(scores, topk_indices, renormalize, e_score_correction_bias)


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """Like ``topk_softmax``, with a sigmoid for each expert, and weights times a factor."""
    scores = gating_output.float().sigmoid()
    bias = e_score_correction_bias
    return _choose(scores, topk_indices, renormalize, bias, routed_scaling_factor)


class ExpertsMethod:
    """Mixin for vLLM's methods of experts: what runs them."""

    moe: Any

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the chosen experts of a vLLM layer; its shared experts run apart.

        Raises:
            NotImplementedError: the activation is not gated SiLU or GELU, or is clamped.
        """
        gate, limit = _GATES.get(layer.activation), self.moe.swiglu_limit
        if gate is None or limit is not None:
            raise NotImplementedError(
                f"NPU mixture of experts: activation {layer.activation} with limit {limit} is not "
                "supported; choose a model with gated SiLU or GELU"
            )
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        return experts(
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids,
            gate,
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
            layer.apply_router_weight_on_input,
            getattr(layer, "w13_weight_scale", None),
            getattr(layer, "w2_weight_scale", None),
        )


@UnquantizedFusedMoEMethod.register_oot(name="UnquantizedFusedMoEMethod")
class NPUFusedMoEMethod(ExpertsMethod, UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """vLLM's method for unquantised experts, over ``experts``."""

    @property
    def is_monolithic(self) -> bool:
        return False


fused_topk_router.vllm_topk_softmax = topk_softmax
fused_topk_router.vllm_topk_sigmoid = topk_sigmoid
fused_topk_bias_router.vllm_topk_softmax = topk_softmax
fused_topk_bias_router.vllm_topk_sigmoid = topk_sigmoid
grouped_topk_router.grouped_topk = inspect.unwrap(grouped_topk_router.grouped_topk)
