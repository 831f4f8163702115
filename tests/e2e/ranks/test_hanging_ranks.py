# SPDX-License-Identifier: Apache-2.0
"""A rank of two that dies, and one that does not answer."""

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from helpers.engine import engine, few
from helpers.patience import wait_for
from helpers.ranks import (
    assert_all,
    fail_on,
    process_id,
)
from helpers.reference import hf_few

from vllm_sleep_ascend.errors import RankGoneError

if TYPE_CHECKING:
    from vllm import LLM


def sleeps(llm: "LLM") -> bool:
    """Put it to sleep, unless a rank has yet to answer an earlier call."""
    try:
        llm.sleep(level=1)
    except RankGoneError as error:
        if "has not answered an earlier call" not in str(error):
            raise
        return False
    return True


def test_a_rank_that_dies_while_it_falls_asleep_is_an_error_and_no_hang(tiny_model) -> None:
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
        additional_config={"sleep_mode": {"rank_timeout_s": 3600}},  # its death alone ends the call
    ) as llm:
        victim = llm.collective_rpc(process_id)[1]
        fail_on(llm, 1, "aclrtMemcpyAsync:1:delay_ms=600000")
        killer = threading.Timer(1, os.kill, (victim, signal.SIGKILL))
        killer.start()
        with pytest.raises(RuntimeError):
            llm.sleep(level=1)


@pytest.mark.slow
def test_a_rank_that_hangs_is_an_error_in_bounded_time(tiny_model) -> None:
    expected = hf_few(tiny_model)
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
        additional_config={"sleep_mode": {"rank_timeout_s": 3}},
    ) as llm:
        # It answers again: the ranks are as they were, and the call can be repeated.
        for rank in (0, 1):
            fail_on(llm, rank, "aclrtMemcpyAsync:1:delay_ms=6000")
            with pytest.raises(RuntimeError, match=r"did not answer within 3 s \(rank_timeout_s\)"):
                llm.sleep(level=1)
            fail_on(llm, rank, "")
            assert_all(llm, "RUNNING")
            llm.sleep(level=1)
            assert_all(llm, "SUSPENDED")
            llm.wake_up()
            assert few(llm) == expected

        # A call of the user's times out: the next one names the rank, and runs once it answers.
        victim = llm.collective_rpc(process_id)[1]
        os.kill(victim, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            llm.collective_rpc(process_id, timeout=1)
        for call in (llm.sleep, lambda: llm.collective_rpc("reload_weights")):
            with pytest.raises(RankGoneError, match="rank 1 has not answered an earlier call"):
                call()
        os.kill(victim, signal.SIGCONT)
        wait_for(lambda: sleeps(llm), "rank 1 to answer again")
        assert_all(llm, "SUSPENDED")
        llm.wake_up()
        assert few(llm) == expected

        # It does not: the other says so, and then the engine ends, which frees the devices.
        victim = llm.collective_rpc(process_id)[0]
        os.kill(victim, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="rank 0 hangs"):
            llm.sleep(level=1)
        with pytest.raises(RuntimeError, match="Executor failed"):
            llm.wake_up()
