# SPDX-License-Identifier: Apache-2.0
"""Run by test_ray.py on the first node of a Ray cluster: an engine with a rank on each node."""

import os

import pytest
from engines import engine
from reference import PROMPTS, hf_greedy, vllm_greedy
from test_parallel import RESIDENT, assert_all, assert_asleep, fail_on, footprint, status


@pytest.fixture(scope="module")
def ranks(tiny_model):
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        distributed_executor_backend="ray",
        tensor_parallel_size=2,
    ) as llm:
        yield llm


def where(worker) -> tuple[str, str | None, int]:
    environment = os.environ
    visible = environment.get("ASCEND_RT_VISIBLE_DEVICES")
    return environment["NPU_SIM_MACHINE"], visible, worker.device.index


def test_each_rank_has_the_device_of_its_node(ranks) -> None:
    """And not the one that is visible to the driver."""
    first, second = os.environ["RAY_NODES"].split(",")
    assert ranks.collective_rpc(where) == [(first, "1", 0), (second, None, 0)]


def test_every_rank_sleeps_and_the_tokens_stay(ranks, tiny_model) -> None:
    expected = hf_greedy(tiny_model)
    assert vllm_greedy(ranks) == expected
    assert all(rank["total"] - rank["free"] > RESIDENT for rank in status(ranks))

    ranks.sleep(level=1)
    assert_asleep(ranks)
    assert all(rank["tags"]["weights"]["host"] > 0 for rank in status(ranks))
    ranks.wake_up()
    assert vllm_greedy(ranks) == expected

    ranks.sleep(level=2)
    assert_asleep(ranks)
    assert all(rank["tags"]["weights"]["host"] == 0 for rank in status(ranks))
    ranks.wake_up(tags=["weights"])
    ranks.collective_rpc("reload_weights")
    ranks.wake_up(tags=["kv_cache"])
    ranks.reset_prefix_cache()
    assert vllm_greedy(ranks) == expected


def test_cycles_leave_nothing_behind(ranks, tiny_model) -> None:
    prompts = PROMPTS[:2]
    expected = hf_greedy(tiny_model, prompts, 4)

    def cycle() -> list:
        ranks.sleep(level=1)
        ranks.wake_up()
        assert vllm_greedy(ranks, prompts, 4) == expected
        return ranks.collective_rpc(footprint)

    cycle()
    figures = [cycle() for _ in range(10)]
    assert figures[1:] == figures[:1] * 9


def test_a_fault_on_the_other_node_keeps_both_as_they_were(ranks, tiny_model) -> None:
    prompts = PROMPTS[:2]
    expected = hf_greedy(tiny_model, prompts, 4)
    fail_on(ranks, 1, "aclrtMemcpyAsync:1:507899")
    with pytest.raises(RuntimeError, match="rank 1, device 0"):
        ranks.sleep(level=1)
    fail_on(ranks, 1, "")
    assert_all(ranks, "RUNNING")
    assert vllm_greedy(ranks, prompts, 4) == expected
    ranks.sleep(level=1)
    fail_on(ranks, 1, "aclrtMapMem:1:507899")
    with pytest.raises(RuntimeError, match="rank 1, device 0"):
        ranks.wake_up()
    fail_on(ranks, 1, "")
    assert_all(ranks, "SUSPENDED")
    ranks.wake_up()
    assert vllm_greedy(ranks, prompts, 4) == expected
