# SPDX-License-Identifier: Apache-2.0
"""The simulated operators of vllm-ascend's own library."""

import pytest
import torch


def gate(x: torch.Tensor, **options):
    arguments = {
        "k_group": 1,
        "group_count": 1,
        "group_select_mode": 1,
        "renorm": 0,
        "norm_type": 0,
        "out_flag": False,
        "routed_scaling_factor": 1.0,
        "eps": 1e-20,
    }
    results = torch.ops._C_ascend.moe_gating_top_k(x.npu(), 2, **{**arguments, **options})
    return [result.cpu() for result in results]


LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, -2.0, 0.5, 2.5]])


def test_softmax():
    weights, experts, norm = gate(LOGITS)
    assert experts.tolist() == [[1, 2], [0, 3]] and experts.dtype == torch.int32
    torch.testing.assert_close(norm, LOGITS.softmax(-1))
    torch.testing.assert_close(weights, LOGITS.softmax(-1).gather(1, experts.long()))
    weights, _, _ = gate(LOGITS, renorm=1, routed_scaling_factor=2.0)
    torch.testing.assert_close(weights, 2 * LOGITS.gather(1, experts.long()).softmax(-1))


def test_a_bias_counts_in_the_choice_only():
    bias = torch.tensor([0.0, -1.0, 0.0, 1.0])
    weights, experts, _ = gate(LOGITS, norm_type=1, bias_opt=bias.npu())
    assert experts.tolist() == [[3, 2], [3, 0]]
    chosen = LOGITS.sigmoid().gather(1, experts.long())
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


def test_groups_are_refused():
    with pytest.raises(RuntimeError, match="groups are not simulated"):
        gate(LOGITS, group_count=2)
