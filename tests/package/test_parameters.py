# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model count: each memory once."""

import torch
from torch import nn

from vllm_sleep_ascend.rank.weights.parameters import own_parameters


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def names(**tensors: torch.Tensor) -> list[str]:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, parameter(tensor))
    return [name for name, _ in own_parameters(model)]


def test_views_of_another_parameter_do_not_count() -> None:
    whole = torch.zeros(4 * (3 + 2), 6)
    by_head = whole.T.view(6, 4, 5)
    keys, values = by_head.split((3, 2), -1)  # as in multi-head latent attention
    assert names(keys=keys.permute(1, 2, 0), whole=whole, values=values.transpose(0, 1)) == [
        "whole"
    ]


def test_parameters_beside_each_other_count() -> None:
    buffer = torch.zeros(10)
    assert names(one=buffer[:4], two=buffer[4:]) == ["one", "two"]
    assert names(one=buffer[:6], two=buffer[4:]) == ["one", "two"]


def test_what_has_no_memory_counts() -> None:
    meta = torch.zeros(4, 4, device="meta")
    assert names(whole=meta, part=meta[:2], empty=torch.zeros(0)) == ["whole", "part", "empty"]


def test_a_view_of_a_part_that_is_no_parameter_counts() -> None:
    whole = torch.zeros(4, 6)
    assert names(one=whole[:, :3], two=whole[:, 3:]) == ["one", "two"]


def test_equal_views_count() -> None:
    whole = torch.zeros(4, 6)
    assert names(one=whole, two=whole.view(6, 4)) == ["one", "two"]
