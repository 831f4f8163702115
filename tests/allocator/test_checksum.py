# SPDX-License-Identifier: Apache-2.0
"""Checksums of device memory detect what a plain sum misses; unchanged memory is not copied."""

import pytest
import torch
from helpers import MIB

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.memory import pool
from vllm_sleep_ascend.memory.checksum import checksums, mix

WORDS = 2 * MIB // 8
DEVICE = torch.device("npu", 0)


@pytest.fixture
def words():
    """2 MiB of device memory, as 64-bit words."""
    torch.npu.set_device(0)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (WORDS,), generator=generator).npu()


def checksum(words: torch.Tensor) -> int:
    torch.npu.synchronize()
    return checksums([(words.data_ptr(), 2 * MIB)], DEVICE)[words.data_ptr()]


def test_equal_contents_have_equal_checksums(words):
    assert checksum(words) == checksum(words.clone())


@pytest.mark.parametrize("bit", [0, 1, 15, 31, 32, 62, 63])
@pytest.mark.parametrize("word", [0, 1, 4096, WORDS - 1])
def test_a_single_flipped_bit_is_seen(words, bit, word):
    before = checksum(words)
    words[word] ^= -(2**63) if bit == 63 else 1 << bit
    assert checksum(words) != before


@pytest.mark.parametrize("other", [1, 4095, 4096, 4097, WORDS - 1])
def test_words_that_change_places_are_seen(words, other):
    before = checksum(words)
    first, second = int(words[0]), int(words[other])
    words[0], words[other] = second, first
    assert checksum(words) != before


def test_every_number_is_mixed_to_another():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**62), 2**62, (100_000,), generator=generator)
    mixed = mix(torch.cat([numbers, ~numbers, numbers ^ 1]).npu()).cpu()
    assert len(mixed.unique()) == len(torch.cat([numbers, ~numbers, numbers ^ 1]).unique())
    assert 0.49 < (mixed < 0).float().mean() < 0.51


def test_rows_that_change_places_are_seen(words):
    before = checksum(words)
    rows = words.view(-1, 4096)
    rows.copy_(rows.flip(0))
    assert checksum(words) != before


def test_two_flipped_signs_are_seen(words):
    before = checksum(words)
    words[0] ^= -(2**63)
    words[5000] ^= -(2**63)
    assert checksum(words) != before


def sums() -> dict[int, int]:
    torch.npu.synchronize()
    mapped = [(a["address"], a["bytes"]) for a in _camem.allocations() if a["state"] == "mapped"]
    return checksums(mapped, DEVICE)


def test_only_what_changed_is_copied():
    torch.npu.set_device(0)
    _camem.configure(chunk_bytes=4 * MIB, keep_host_backup=True, copy_threads=2, host_threads=2)
    tensors = []
    for seed in range(2):
        with pool.use_pool("weights"):
            tensors.append(torch.empty(24 * MIB // 4, dtype=torch.int32, device="npu"))
        tensors[-1].fill_(seed + 1)
    first = _camem.sleep({"weights": "offload"}, "offload", sums())["tags"]["weights"]
    assert first["unchanged"] == 0
    _camem.wake(["weights"])
    tensors[1].fill_(7)
    second = _camem.sleep({"weights": "offload"}, "offload", sums())["tags"]["weights"]
    assert second["unchanged"] > 0
    assert second["offloaded"] > 0
    assert second["unchanged"] + second["offloaded"] == first["offloaded"]
    _camem.wake(["weights"])
    assert bool((tensors[0] == 1).all())
    assert bool((tensors[1] == 7).all())
    del tensors
    pool.release_pools()
