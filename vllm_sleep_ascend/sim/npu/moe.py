# SPDX-License-Identifier: Apache-2.0
"""Operators of a mixture of experts.

Rows are (token, choice) pairs, numbered token by token: ``token * choices + choice``.
"""

from typing import Any

import torch

from vllm_sleep_ascend.sim.npu.require import require


def gating_top_k(
    x: torch.Tensor,
    k: int,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    bias_opt: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and int32 ids of each token's top ``k`` experts, and the scores of all experts.

    Scores are a softmax (``norm_type`` 0), or a sigmoid (1) whose chosen values are scaled to a sum
    of one. ``renorm`` 1 takes the softmax of the chosen experts. A bias affects only the choice.
    """
    require(group_count == 1 and k_group == 1, "moe_gating_top_k", "groups are not simulated")
    scores = x.float()
    norm = scores.softmax(-1) if norm_type == 0 else scores.sigmoid()
    chosen = (norm if bias_opt is None else norm + bias_opt.float()).topk(k, -1).indices
    weights = norm.gather(-1, chosen)
    if renorm == 1 or norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), chosen.int(), norm


def init_routing(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the rows by expert. Returns each row's token; its destination (``row_idx_type`` 0; -1
    for experts out of range) or source (1); each expert's number of rows; and no scale."""
    rows = expert_idx.numel()
    name = "moe_init_routing"
    require(quant_mode == -1 and scale is None, name, "quantization is not simulated")
    require(expert_tokens_num_type == 1, name, "counts of tokens other than type 1")
    require(active_num in (-1, 0, rows), name, f"active_num {active_num} of {rows} rows")
    first, last = active_expert_range or (0, expert_num)
    experts = expert_idx.flatten().long()
    order = experts.masked_fill((experts < first) | (experts >= last), last).sort(stable=True)
    origin = order.indices
    counts = torch.bincount(order.values - first, minlength=last - first + 1)[:-1]
    if row_idx_type == 1:
        index = origin
    else:
        place = torch.arange(rows, device=x.device).masked_fill(order.values == last, -1)
        index = torch.empty_like(origin).index_copy_(0, origin, place)
    expanded = x[origin // expert_idx.shape[1]]
    return expanded, index.int(), counts, x.new_empty(rows, dtype=torch.float32)


def init_routing_meta(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    expert_num: int = -1,
    active_expert_range: list[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = expert_idx.numel()
    first, last = active_expert_range or (0, expert_num)
    return (
        x.new_empty(rows, x.shape[1]),
        x.new_empty(rows, dtype=torch.int32),
        x.new_empty(last - first, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.float32),
    )


def token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    """The sum of each token's rows, weighted by ``probs`` (tokens, choices)."""
    require(not padded_mode, "npu_moe_token_unpermute", "padded_mode is not simulated")
    choices = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens[sorted_indices.long()].float()
    rows = rows.view(-1, choices, rows.shape[-1])
    if probs is not None:
        # A row of another rank's expert has weight zero and arbitrary content.
        rows = torch.where(probs.unsqueeze(-1) == 0, 0.0, rows * probs.float().unsqueeze(-1))
    return rows.sum(1).to(permuted_tokens.dtype)


def grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    **unsupported: Any,
) -> list[torch.Tensor]:
    """Multiply each group's rows by its matrix in ``weight[0]``, (groups, inner, outer)."""
    name = "npu_grouped_matmul"
    given = [key for key, argument in unsupported.items() if argument is not None]
    require(not given, name, f"{', '.join(given)} is not simulated")
    require(len(x) == len(weight) == 1, name, "several tensors are not simulated")
    require(split_item in (2, 3) and group_type == 0, name, "only rows grouped, into one output")
    require(act_type == 0, name, f"activation {act_type} is not simulated")
    require(group_list is not None and group_list.dtype == torch.int64, name, "no int64 groups")
    assert group_list is not None
    ends = group_list.cumsum(0) if group_list_type == 1 else group_list
    [rows], [matrices] = x, weight
    require(
        matrices.dim() == 3 and len(ends) == len(matrices) and rows.shape[1] == matrices.shape[1],
        name,
        f"rows {tuple(rows.shape)} and weight {tuple(matrices.shape)} for {len(ends)} groups",
    )
    output = rows.new_empty(len(rows), matrices.shape[2])
    begin = 0
    for group, end in enumerate(ends.tolist()):
        if end > begin:
            product = rows[begin:end].float() @ matrices[group].float()
            if bias is not None:
                product += bias[0][group].float()
            output[begin:end] = product.to(rows.dtype)
        begin = end
    return [output]


KERNELS = {
    "npu::npu_moe_init_routing_v2": init_routing,
    "npu::npu_moe_token_unpermute": token_unpermute,
    "npu::npu_grouped_matmul": grouped_matmul,
}

VLLM_ASCEND = {
    "_C_ascend::moe_gating_top_k": (
        "(Tensor x, int k, int k_group, int group_count, int group_select_mode, int renorm, "
        "int norm_type, bool out_flag, float routed_scaling_factor, float eps, "
        "Tensor? bias_opt=None) -> (Tensor, Tensor, Tensor)",
        gating_top_k,
        gating_top_k,
    ),
    "_C_ascend::npu_moe_init_routing_custom": (
        "(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, "
        "int active_num=-1, int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, "
        "int expert_tokens_num_type=0, bool expert_tokens_num_flag=False, int quant_mode=0, "
        "int[2] active_expert_range=[], int row_idx_type=0) -> (Tensor, Tensor, Tensor, Tensor)",
        init_routing,
        init_routing_meta,
    ),
}
"""Operators of vllm-ascend's library: schema, kernel and meta kernel."""
