# SPDX-License-Identifier: Apache-2.0
"""Two ranks beside vllm-ascend with its extra clean-up: all sleep and wake, or none."""

import pytest
from helpers.ascend_engine import engine_of_ranks
from helpers.engine import tokens
from helpers.ranks import assert_all, fail_on
from helpers.reference import PROMPTS, hf_greedy

TOKENS = 6
DRIVER_ERROR = 507899


@pytest.fixture(scope="module")
def llm(tiny_model):
    with engine_of_ranks(
        tiny_model,
        tensor_parallel_size=2,
        additional_config={"enable_sleep_mode_extra_cleanup": True},
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(tiny_model):
    return hf_greedy(tiny_model, PROMPTS[:4], TOKENS)


def communicators(llm) -> list[int]:
    return [rank["resident"]["communicators"] for rank in llm.collective_rpc("sleep_status")]


def test_all_ranks_sleep_and_release_their_communicators(llm, expected):
    assert tokens(llm, PROMPTS[:4], TOKENS) == expected
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
        assert tokens(llm, PROMPTS[:4], TOKENS) == expected


def test_a_fault_on_one_rank_keeps_all_as_they_were(llm, expected):
    fail_on(llm, 1, f"aclrtMemcpyAsync:1:{DRIVER_ERROR}")
    with pytest.raises(RuntimeError, match=r"rank 1, device 1: .*aclrtMemcpyAsync failed"):
        llm.sleep(level=1)
    fail_on(llm, 1, "")
    assert_all(llm, "RUNNING")
    assert tokens(llm, PROMPTS[:4], TOKENS) == expected
    llm.sleep(level=1)
    fail_on(llm, 0, f"aclrtMapMem:1:{DRIVER_ERROR}")
    with pytest.raises(RuntimeError, match=r"rank 0, device 0: .*aclrtMapMem failed"):
        llm.wake_up()
    fail_on(llm, 0, "")
    assert_all(llm, "SUSPENDED")
    llm.wake_up()
    assert tokens(llm, PROMPTS[:4], TOKENS) == expected


class Dispatcher:
    """An expert dispatcher in vllm-ascend's list of those that refer to a communicator by name."""

    def __init__(self, fails: bool) -> None:
        self.token_dispatcher = self
        self.fails, self.calls = fails, 0

    def refresh_hccl_group(self) -> None:
        self.calls += 1
        if self.fails and self.calls == 1:
            raise RuntimeError("the group has no name")


def add_dispatcher(worker, failing_rank: int) -> None:
    from vllm_ascend.ops.fused_moe.moe_comm_method import _MoECommMethods

    _MoECommMethods["test"] = Dispatcher(worker.rank == failing_rank)


def remove_dispatcher(worker) -> int:
    from vllm_ascend.ops.fused_moe.moe_comm_method import _MoECommMethods

    return _MoECommMethods.pop("test").calls


def test_what_follows_a_wake_is_repeated_on_all_ranks_when_it_fails_on_one(llm, expected):
    for rank in (0, 1):
        llm.collective_rpc(add_dispatcher, args=(rank,))
        llm.sleep(level=1)
        with pytest.raises(RuntimeError, match=f"rank {rank}, device {rank}: the group has no"):
            llm.wake_up()
        assert llm.llm_engine.is_sleeping()
        assert llm.collective_rpc("sleeping_tags") == [{"weights", "kv_cache"}] * 2
        llm.wake_up()
        assert not llm.llm_engine.is_sleeping()
        assert llm.collective_rpc(remove_dispatcher) == [2, 2]
        assert_all(llm, "RUNNING")
        assert tokens(llm, PROMPTS[:4], TOKENS) == expected
