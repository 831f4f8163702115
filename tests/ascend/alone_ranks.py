# SPDX-License-Identifier: Apache-2.0
"""Two ranks beside vllm-ascend, with its extra clean-up on: all sleep and wake, or none.

Run by itself (``pytest tests/ascend/alone_ranks.py``): at its end vLLM 0.23 may wait for ever for a
zmq context of an engine in this process with workers in others.
"""

import pytest
from ascend_engines import engine
from ranks import assert_all, fail_on
from reference import PROMPTS, hf_greedy, vllm_greedy

TOKENS = 6
DRIVER_ERROR = 507899


@pytest.fixture(scope="module")
def llm(tiny_model):
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        additional_config={"enable_sleep_mode_extra_cleanup": True},
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(tiny_model):
    return hf_greedy(tiny_model, PROMPTS[:4], TOKENS)


def tokens(llm):
    return vllm_greedy(llm, PROMPTS[:4], TOKENS)


def communicators(llm) -> list[int]:
    return [rank["resident"]["communicators"] for rank in llm.collective_rpc("sleep_status")]


def test_all_ranks_sleep_and_release_their_communicators(llm, expected):
    assert tokens(llm) == expected
    assert all(held > 0 for held in communicators(llm))
    for level in (1, 2):
        llm.sleep(level=level)
        assert_all(llm, "SUSPENDED")
        assert communicators(llm) == [0, 0]
        llm.wake_up(tags=["weights"])
        if level == 2:
            llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        llm.reset_prefix_cache()
        assert tokens(llm) == expected


def test_a_fault_on_one_rank_keeps_all_as_they_were(llm, expected):
    fail_on(llm, 1, f"aclrtMemcpyAsync:1:{DRIVER_ERROR}")
    with pytest.raises(RuntimeError, match=r"rank 1, device 1: .*aclrtMemcpyAsync failed"):
        llm.sleep(level=1)
    fail_on(llm, 1, "")
    assert_all(llm, "RUNNING")
    assert tokens(llm) == expected
    llm.sleep(level=1)
    fail_on(llm, 0, f"aclrtMapMem:1:{DRIVER_ERROR}")
    with pytest.raises(RuntimeError, match=r"rank 0, device 0: .*aclrtMapMem failed"):
        llm.wake_up()
    fail_on(llm, 0, "")
    assert_all(llm, "SUSPENDED")
    llm.wake_up()
    assert tokens(llm) == expected
