# SPDX-License-Identifier: Apache-2.0
"""The proposer's kernels in PyTorch compared with a loop over requests and tokens."""

import pytest
import torch

pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN or the simulator")

PAD = -1


def test_step():
    from vllm_sleep_ascend.native.drafting import eagle_step_slot_mapping_metadata

    positions, lengths = torch.tensor([0, 3, 6, 7]), torch.tensor([1, 4, 7, 8], dtype=torch.int32)
    blocks = torch.tensor([[5, 1], [2, 9], [4, 3], [6, 8]], dtype=torch.int32)
    out, slots = torch.empty(4, dtype=torch.int64), torch.empty(6, dtype=torch.int64)
    eagle_step_slot_mapping_metadata(positions, blocks, 2, lengths, out, slots, 4, 8, 2, PAD, 4)
    assert out.tolist() == [1, 4, 7, 0]
    assert slots.tolist() == [21, 36, 15, PAD, PAD, PAD]
    assert lengths.tolist() == [2, 5, 8, 1]


def test_what_stands_of_a_step():
    from vllm_sleep_ascend.native import drafting

    sampled = torch.tensor([[7, 8, 9], [7, -1, -1], [-1, -1, -1], [3, 4, 5]], dtype=torch.int32)
    discarded = torch.tensor([False, False, False, True])
    backup = torch.tensor([20, 21, 22, 23], dtype=torch.int32)
    following, counts = torch.empty(2, 4, dtype=torch.int32)
    drafting.eagle_prepare_next_token_padded(
        sampled, discarded, backup, following, counts, 10, 3, 4, 3, 4
    )
    assert following.tolist() == [9, 7, 22, 23]
    assert counts.tolist() == [3, 1, 0, 0]

    totals, starts = torch.tensor([2, 4, 4], dtype=torch.int32), torch.tensor([0, 3, 6, 10])
    last, rejected = torch.empty(2, 3, dtype=torch.int32)
    drafting.eagle_prepare_inputs_padded(
        totals, torch.tensor([3, 1, 1], dtype=torch.int32), starts, last, rejected, 3
    )
    assert rejected.tolist() == [0, 2, 0]
    assert last.tolist() == [2, 3, 9]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("extra", [1, 3])
def test_inputs_of_the_draft_model(shift, extra):
    from vllm_sleep_ascend.native.drafting import copy_and_expand_eagle_inputs

    starts, ends = torch.tensor([0, 4, 5, 11]), torch.tensor([2, 4, 9])
    tokens, sampled = torch.arange(100, 111, dtype=torch.int32), torch.tensor([7, 8, 9]).int()
    positions = torch.cat([torch.arange(n) + 10 * n for n in (4, 1, 6)])
    want: dict[str, list[int]] = {"id": [], "at": [], "rejected": [], "masked": [], "new": []}
    mapping = []
    for r in range(3):
        start, end, stop = starts[r].item(), ends[r].item(), starts[r + 1].item()
        mapping += range(len(want["id"]), len(want["id"]) + stop - start)
        kept = tokens[start + shift : end + 1].tolist()
        lost = stop - end - 1
        want["new"] += range(len(want["id"]) + len(kept), len(want["id"]) + len(kept) + extra)
        want["id"] += [*kept, sampled[r].item(), *[55] * (extra - 1), *[0] * lost]
        want["at"] += [positions[start].item() + i for i in range(len(kept) + extra)] + [0] * lost
        want["rejected"] += [0] * (len(kept) + extra) + [1] * lost
        want["masked"] += [0] * (len(kept) + 1) + [1] * (extra - 1) + [0] * lost
    total = len(want["id"])
    out = {name: torch.empty(total, dtype=torch.int64) for name in ("id", "at")}
    out |= {name: torch.empty(total, dtype=torch.bool) for name in ("rejected", "masked")}
    out["new"], where = torch.empty(3 * extra).int(), torch.empty(11).int()
    copy_and_expand_eagle_inputs(
        *(tokens, positions, sampled, *out.values(), where, starts, ends),
        *(0, 55, 11, extra, shift, 256),
    )
    assert {name: values.int().tolist() for name, values in out.items()} == want
    if shift:
        assert where.tolist() == mapping
