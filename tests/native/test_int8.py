# SPDX-License-Identifier: Apache-2.0
"""Weights as 8-bit integers: their deviation from the original weights."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN or the simulator")


def test_a_weight_is_off_by_half_a_step_at_most():
    from vllm_sleep_ascend.native.int8 import linear, quantize

    torch.manual_seed(0)
    weight = torch.randn(3, 7, 11) * torch.tensor([1e-4, 1.0, 100.0]).view(3, 1, 1)
    weight[1, 2] = 0
    levels, scale = quantize(weight)
    assert (levels.dtype, levels.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, weight.shape[:-1])
    assert levels.abs().amax(dim=-1).unique().tolist() == [0, 127]
    for want, matrix, steps in zip(weight, levels, scale, strict=True):
        got = linear(torch.eye(11), matrix, None, steps).T
        half_a_step = want.abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((got - want).abs() <= half_a_step * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_stay_in_range(dtype):
    from vllm_sleep_ascend.native.int8 import linear, quantize

    x, weight = torch.full((2, 4096), 4.0, dtype=dtype), torch.full((3, 4096), 2.0, dtype=dtype)
    out = linear(x, *quantize(weight)[:1], torch.ones(3, dtype=dtype), quantize(weight)[1])
    assert out.dtype == dtype
    torch.testing.assert_close(out, F.linear(x, weight) + 1, rtol=0.01, atol=0)
