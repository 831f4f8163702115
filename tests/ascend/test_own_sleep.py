# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own sleep mode, as it is: what ours is compared with."""

import pytest
import torch
from ascend_engines import engine
from reference import hf_greedy, vllm_greedy
from safetensors.torch import load_file
from support import MIB, make_model

KV_CACHE = 64 * MIB


@pytest.fixture(scope="module")
def llm(tiny_model):
    with engine(tiny_model, enable_sleep_mode=True, kv_cache_memory_bytes=KV_CACHE) as llm:
        yield llm


def free() -> int:
    return torch.npu.mem_get_info()[0]


def pool_bytes() -> int:
    from vllm_ascend.device_allocator.camem import CaMemAllocator

    return CaMemAllocator.get_instance().get_current_usage()


def network(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def test_level_1(llm, tiny_model):
    """Weights and cache are freed, come back, and answer as before."""
    expected = hf_greedy(tiny_model)
    assert vllm_greedy(llm) == expected
    awake, pool = free(), pool_bytes()
    assert pool >= KV_CACHE
    llm.sleep(level=1)
    asleep = free()
    assert asleep - awake >= pool
    llm.wake_up()
    assert asleep - free() == pool
    assert vllm_greedy(llm) == expected


def test_level_2(llm, tiny_model):
    """It has no reload_weights: whoever sleeps at level 2 loads the weights into the model."""
    few = 2
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    network(llm).load_weights(load_file(tiny_model / "model.safetensors").items())
    llm.wake_up(tags=["kv_cache"])
    assert vllm_greedy(llm)[:few] == hf_greedy(tiny_model)[:few]


def test_experts():
    """Tokens of a mixture of experts; and what a level-1 wake makes of its layout: the checkpoint's,
    which the weights no longer have, so that the next step is refused."""
    model = make_model("tiny-qwen3-moe")
    with engine(model, enable_sleep_mode=True) as llm:
        assert vllm_greedy(llm) == hf_greedy(model)
        before = {name: tuple(w.shape) for name, w in network(llm).named_parameters()}
        llm.sleep(level=1)
        llm.wake_up()
        turned = {
            name.split(".")[-1]
            for name, weight in network(llm).named_parameters()
            if tuple(weight.shape) != before[name]
        }
        assert turned == {"w13_weight", "w2_weight"}
        with pytest.raises(RuntimeError, match="npu_grouped_matmul: rows"):
            vllm_greedy(llm)
