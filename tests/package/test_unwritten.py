# SPDX-License-Identifier: Apache-2.0
"""Marks in memory: every type of weight, ranges that were not written, and the names of shards."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm_sleep_ascend.rank.weights.shards import shards_of
from vllm_sleep_ascend.rank.weights.unwritten import mark, unwritten, unwritten_at_start

FLOATS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
SHAPES = ((), (1,), (7,), (4, 6), (3, 5, 4))


def anything(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Possible weights, including the greatest and the least."""
    if dtype not in FLOATS:
        info = torch.iinfo(dtype)
        return torch.randint(info.min + 1, info.max, shape, dtype=dtype)
    numbers = torch.randn(shape, dtype=torch.float32)
    return torch.where(numbers > 2, -torch.inf, numbers).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mark_is_seen_until_all_is_written(dtype, shape):
    tensor = torch.empty(shape, dtype=dtype)
    mark(tensor)
    assert unwritten([tensor, tensor]) == [True, True]
    assert unwritten_at_start([tensor]) == [True]
    if dtype in FLOATS:
        assert tensor.double().isnan().all()
    tensor.copy_(anything(dtype, shape))
    assert unwritten([tensor]) == unwritten_at_start([tensor]) == [False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("at", range(0, 24, 2))
def test_two_numbers_that_were_left_out_are_seen(dtype, at):
    tensor = anything(dtype, (4, 6))
    assert unwritten([tensor]) == [False]
    mark(tensor.view(-1)[at : at + 2])
    assert unwritten([tensor]) == [True]
    assert unwritten_at_start([tensor]) == [at == 0]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_row_of_integers_that_was_left_out_is_seen_and_a_single_number_is_one(dtype):
    tensor = anything(dtype, (4, 6))
    mark(tensor[2])
    assert unwritten([tensor]) == [True]
    tensor[2, 1:] = 1
    assert unwritten([tensor]) == [False]


def test_weights_that_lie_otherwise_in_memory_and_empty_ones():
    whole = torch.zeros(6, 4, dtype=torch.bfloat16)
    turned, part = whole.t(), whole[:, 1:3]
    assert unwritten([turned, part, whole[:0]]) == [False, False, False]
    mark(part)
    assert unwritten([turned, part, whole[:, 0]]) == [True, True, False]
    assert unwritten([]) == []


def test_other_nans_are_numbers_that_somebody_wrote():
    tensor = torch.full((4, 4), torch.nan, dtype=torch.bfloat16)
    assert unwritten([tensor, tensor.float()]) == [False, False]


class Fused(nn.Module):
    """A model like vLLM's, with one layer of each fused kind."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Module()
        self.qkv_proj.output_partition_sizes = [4, 2, 2]
        self.qkv_proj.weight = nn.Parameter(torch.zeros(8, 3))
        self.experts = nn.Module()
        self.experts.expert_map = torch.tensor([-1, 0, -1, 1])
        self.experts.w13_weight = nn.Parameter(torch.zeros(2, 6, 3))
        self.experts.w2_weight = nn.Parameter(torch.zeros(2, 3, 3))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.zeros(3))


def test_shards_have_the_names_of_checkpoints_and_cover_the_parameter():
    model = Fused()
    names = {
        "qkv_proj.weight": {"q_proj.weight": 12, "k_proj.weight": 6, "v_proj.weight": 6},
        "experts.w13_weight": {
            f"experts.{expert}.{part}.weight": 9
            for expert in (1, 3)
            for part in ("gate_proj", "up_proj")
        },
        "experts.w2_weight": {"experts.1.down_proj.weight": 9, "experts.3.down_proj.weight": 9},
        "norm.weight": {"norm.weight": 3},
    }
    for name, parameter in model.named_parameters():
        shards = shards_of(model, name, parameter)
        assert {shard: part.numel() for shard, part in shards.items()} == names[name]
    # A parameter whose parts do not match its layer is named as a whole.
    other = SimpleNamespace(shape=(5, 3), dim=lambda: 2)
    assert list(shards_of(model, "qkv_proj.weight", other)) == ["qkv_proj.weight"]
