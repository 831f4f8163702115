# SPDX-License-Identifier: Apache-2.0
"""Slot mapping compared with the Triton kernel's arithmetic, token by token."""

import pytest
import torch

from vllm_sleep_ascend.native.attention.slot_mapping import compute_slot_mapping

PAD = -1


def expected(query_lens, starts, table, block_size, world, rank, interleave):
    slots = []
    for row, (count, first) in enumerate(zip(query_lens, starts, strict=True)):
        for position in range(first, first + count):
            block, offset = divmod(position, block_size * world)
            stripe, place = divmod(offset, interleave)
            if stripe % world != rank:
                slots.append(PAD)
                continue
            local = stripe // world * interleave + place
            slots.append(int(table[row][block]) * block_size + local)
    return slots


@pytest.mark.parametrize("world,interleave", [(1, 1), (2, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("block_size", [1, 8, 128])
@pytest.mark.parametrize(
    "query_lens,starts",
    [
        ([5], [0]),
        ([1, 1, 1], [0, 17, 300]),
        ([3, 0, 40, 1], [0, 9, 100, 63]),
        ([0, 0], [0, 0]),
    ],
)
def test_equals_kernel(query_lens, starts, block_size, world, interleave):
    if block_size % interleave:
        pytest.skip("vLLM asks for whole stripes per block")
    torch.manual_seed(0)
    tokens, padded = sum(query_lens), sum(query_lens) + 7
    table = torch.randint(1, 10_000, (len(query_lens) + 2, 400), dtype=torch.int32)
    # vLLM's buffers are longer than the batch and hold an earlier batch's values.
    positions = torch.full((tokens + 3,), 123, dtype=torch.int64)
    positions[:tokens] = torch.tensor(
        [p for n, s in zip(query_lens, starts, strict=True) for p in range(s, s + n)]
    )
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    for rank in range(world):
        slots = torch.full((padded + 4,), 99, dtype=torch.int64)
        compute_slot_mapping(
            tokens,
            padded,
            query_start,
            positions,
            table,
            table.stride(0),
            slots,
            block_size,
            world,
            rank,
            interleave,
            PAD,
            1024,
        )
        want = expected(query_lens, starts, table, block_size, world, rank, interleave)
        assert slots[:tokens].tolist() == want
        assert slots[tokens:padded].eq(PAD).all()
        assert slots[padded:].eq(99).all(), "wrote past the slot mapping"
