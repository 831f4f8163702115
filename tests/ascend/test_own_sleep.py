# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own sleep mode, as it is: what ours is compared with."""

import pytest
import torch
from ascend_engines import engine
from reference import hf_greedy, vllm_greedy
from support import MIB

KV_CACHE = 64 * MIB


@pytest.fixture(scope="module")
def llm(tiny_model):
    with engine(tiny_model, enable_sleep_mode=True, kv_cache_memory_bytes=KV_CACHE) as llm:
        yield llm


def free() -> int:
    return torch.npu.mem_get_info()[0]


def test_level_1_frees_weights_and_cache_and_brings_them_back(llm, tiny_model):
    expected = hf_greedy(tiny_model)
    assert vllm_greedy(llm) == expected
    awake = free()
    llm.sleep(level=1)
    asleep = free()
    assert asleep - awake >= KV_CACHE
    llm.wake_up()
    assert free() <= asleep - KV_CACHE
    assert vllm_greedy(llm) == expected
