# SPDX-License-Identifier: Apache-2.0
"""Run by test_ray.py on the first node of a Ray cluster: an engine with a rank on each node."""

import os

import pytest
from helpers.engine import engine, few
from helpers.ranks import (
    assert_all,
    assert_cycles_leave_nothing,
    assert_tokens_survive_sleep,
    fail_on,
)
from helpers.reference import hf_few


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
    assert_tokens_survive_sleep(ranks, tiny_model)


def test_cycles_leave_nothing_behind(ranks, tiny_model) -> None:
    assert_cycles_leave_nothing(ranks, tiny_model)


def test_a_fault_on_the_other_node_keeps_both_as_they_were(ranks, tiny_model) -> None:
    expected = hf_few(tiny_model)
    fail_on(ranks, 1, "aclrtMemcpyAsync:1:507899")
    with pytest.raises(RuntimeError, match="rank 1, device 0"):
        ranks.sleep(level=1)
    fail_on(ranks, 1, "")
    assert_all(ranks, "RUNNING")
    assert few(ranks) == expected
    ranks.sleep(level=1)
    fail_on(ranks, 1, "aclrtMapMem:1:507899")
    with pytest.raises(RuntimeError, match="rank 1, device 0"):
        ranks.wake_up()
    fail_on(ranks, 1, "")
    assert_all(ranks, "SUSPENDED")
    ranks.wake_up()
    assert few(ranks) == expected
