# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch experts against a loop over tokens and experts. Needs CANN or the simulator."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN or the simulator")

TOKENS, HIDDEN, INNER, EXPERTS, CHOSEN = 13, 8, 6, 5, 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_experts(bias, weigh_input, elsewhere):
    from vllm_sleep_ascend.native.moe import experts

    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN)
    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    b1, b2 = (
        (torch.randn(EXPERTS, 2 * INNER), torch.randn(EXPERTS, HIDDEN)) if bias else (None,) * 2
    )
    weights = torch.rand(TOKENS, CHOSEN)
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:CHOSEN] for _ in range(TOKENS)]).int()
    if elsewhere:
        ids[::3, 0] = -1
    want = torch.zeros(TOKENS, HIDDEN)
    for t in range(TOKENS):
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            if e < 0:
                continue
            row = x[t] * weight if weigh_input else x[t]
            left, right = F.linear(row, gate_up[e], None if b1 is None else b1[e]).chunk(2)
            out = F.linear(F.silu(left) * right, down[e], None if b2 is None else b2[e])
            want[t] += out if weigh_input else out * weight
    got = experts(x, gate_up, down, weights, ids, F.silu, b1, b2, weigh_input)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("renormalize", [False, True])
def test_router(renormalize):
    from vllm_sleep_ascend.native.moe import topk_sigmoid, topk_softmax

    logits = torch.randn(7, EXPERTS)
    like = torch.empty(7, CHOSEN, dtype=torch.int32)
    for choose, score in ((topk_softmax, logits.softmax(-1)), (topk_sigmoid, logits.sigmoid())):
        weights, ids = choose(torch.empty(7, CHOSEN), like, like, logits, renormalize)
        assert ids.dtype == like.dtype
        best = score.sort(descending=True).values[:, :CHOSEN]
        if renormalize:
            best = best / best.sum(-1, keepdim=True)
        torch.testing.assert_close(weights, best)
        assert torch.equal(ids.long(), score.topk(CHOSEN).indices)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_experts_are_chosen_with_a_bias(scoring, renormalize, biased):
    """It counts for the choice, not for the weights. vLLM's kernels for it are CUDA's."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import fused_topk_bias

    import vllm_sleep_ascend.native.moe  # noqa: F401

    torch.manual_seed(0)
    logits = torch.randn(TOKENS, EXPERTS)
    bias = torch.tensor([3.0, 0.0, 0.0, 2.0, 0.0]) if biased else None
    x = torch.zeros(TOKENS, HIDDEN)
    weights, ids = fused_topk_bias(
        x, logits, scoring, bias, CHOSEN, renormalize, routed_scaling_factor=2.5
    )
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    for token in range(TOKENS):
        scores = logits[token].softmax(0) if scoring == "softmax" else logits[token].sigmoid()
        best = [0, 3] if biased else scores.topk(CHOSEN).indices.tolist()
        assert ids[token].tolist() == best
        want = 2.5 * scores[best]
        torch.testing.assert_close(
            weights[token], want / scores[best].sum() if renormalize else want
        )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_experts_in_groups_are_chosen_without_a_compiler(scoring):
    """Two of the best half of four groups; a bias counts for the choice, not for the weights."""
    from torch._dynamo.utils import counters
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router

    import vllm_sleep_ascend.native.moe  # noqa: F401

    torch.manual_seed(0)
    logits, bias = torch.randn(TOKENS, 8), torch.randn(8) if scoring == "sigmoid" else None
    frames = counters["frames"]["total"]
    weights, ids = grouped_topk_router.grouped_topk(
        torch.zeros(TOKENS, HIDDEN),
        logits,
        topk=2,
        renormalize=True,
        num_expert_group=4,
        topk_group=2,
        scoring_func=scoring,
        routed_scaling_factor=2.5,
        e_score_correction_bias=bias,
    )
    assert counters["frames"]["total"] == frames
    for token in range(TOKENS):
        scores = logits[token].softmax(0) if bias is None else logits[token].sigmoid()
        choice = scores if bias is None else scores + bias
        groups = choice.view(4, 2)
        of_group = groups.amax(1) if bias is None else groups.sum(1)
        allowed = [e for g in of_group.topk(2).indices.tolist() for e in (2 * g, 2 * g + 1)]
        chosen = sorted(allowed, key=lambda e: choice[e].item(), reverse=True)[:2]
        assert sorted(ids[token].tolist()) == sorted(chosen)
        want = 2.5 * scores[ids[token].long()] / scores[chosen].sum()
        torch.testing.assert_close(weights[token], want)
