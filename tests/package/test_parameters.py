# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model count: each memory once."""

import torch
from torch import nn

from vllm_sleep_ascend.rank.weights.parameters import clone_parameters, own_parameters


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


def test_clones_keep_what_is_a_part_a_part() -> None:
    """A write to the whole writes its parts, before and after."""
    model = nn.Module()
    buffer = torch.arange(3.0 + 4 * 5 * 6)
    whole = buffer[3:].view(20, 6)
    keys, values = whole.T.view(6, 4, 5).split((3, 2), -1)
    tensors = {"keys": keys.permute(1, 2, 0), "whole": whole, "values": values.transpose(0, 1)}
    for name, tensor in {**tensors, "other": torch.ones(2), "kept": torch.ones(3)}.items():
        model.register_parameter(name, parameter(tensor))
    kept, before = model.kept.data_ptr(), {n: p.clone() for n, p in model.named_parameters()}
    shapes = {n: (p.shape, p.stride()) for n, p in model.named_parameters()}
    clone_parameters(model, lambda p: p is not model.kept)
    assert model.kept.data_ptr() == kept
    assert {n: (p.shape, p.stride()) for n, p in model.named_parameters()} == shapes
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert [name for name, _ in own_parameters(model)] == ["whole", "other", "kept"]
    storage = model.whole.untyped_storage()
    assert storage.data_ptr() != buffer.untyped_storage().data_ptr()
    assert storage.nbytes() == whole.nbytes
    with torch.no_grad():
        model.whole.zero_()
    assert not model.keys.any()
    assert not model.values.any()
    assert buffer[3:].any()
