# SPDX-License-Identifier: Apache-2.0
"""Work hangs on the device of one of two ranks: both are unchanged."""

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.engine import engine, few
from helpers.ranks import assert_all
from helpers.stuck_copy import StuckCopy, let_go

from vllm_sleep_ascend import safe_while_asleep
from vllm_sleep_ascend.errors import AclError

STUCK_RANK = 1


@pytest.fixture(scope="module")
def ranks(tiny_model) -> Iterator[Any]:
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        additional_config={"sleep_mode": {"device_timeout_s": 0.5}},
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
    ) as llm:
        yield llm


@safe_while_asleep
def get_stuck(worker: Any) -> None:
    if worker.rank == STUCK_RANK:
        worker.stuck = StuckCopy()
        worker.stuck.launch()


@safe_while_asleep
def get_stuck_when_awake(worker: Any) -> None:
    """Hang in the next wake after the memory is back, before the ranks agree that it succeeded."""
    if worker.rank != STUCK_RANK:
        return
    backend = worker.sleep_mode_backend

    def resume(tags: list[str] | None) -> None:
        del backend.resume
        backend.resume(tags)
        get_stuck(worker)

    backend.resume = resume


@safe_while_asleep
def let_it_go(worker: Any) -> None:
    let_go()


def test_no_rank_sleeps_while_work_runs_on_one(ranks, expected) -> None:
    ranks.collective_rpc(get_stuck)
    with pytest.raises(AclError, match=r"rank 1, device 1: .*\(device_timeout_s\)"):
        ranks.sleep(level=1)
    assert_all(ranks, "RUNNING")
    ranks.collective_rpc(let_it_go)
    assert few(ranks) == expected
    ranks.sleep(level=1)
    assert_all(ranks, "SUSPENDED")
    ranks.wake_up()
    assert few(ranks) == expected


def test_nothing_is_unmapped_while_work_runs_on_it(ranks, expected) -> None:
    """The simulator would abort the process. The next operation frees what stays mapped."""
    ranks.sleep(level=1)
    ranks.collective_rpc(get_stuck_when_awake)
    with pytest.raises(AclError, match=r"rank 1, device 1: .*could not be rolled back \(.*rank 1"):
        ranks.wake_up()
    with pytest.raises(AclError, match=r"rank 1, device 1: .*\(device_timeout_s\)"):
        ranks.wake_up()
    ranks.collective_rpc(let_it_go)
    ranks.wake_up()
    assert_all(ranks, "RUNNING")
    assert few(ranks) == expected
