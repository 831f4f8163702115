# SPDX-License-Identifier: Apache-2.0
"""A call fails on one of two ranks: the first of each name, or with ``--long`` every one."""

import pytest
from helpers.engine import engine, tokens
from helpers.rank_faults import Sweep, first_of_each_name
from helpers.reference import FEW


@pytest.fixture(scope="module")
def ranks(tiny_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCCL_CONNECT_TIMEOUT", "4")  # short waits for a rank that failed
        with engine(
            tiny_model,
            enable_sleep_mode=True,
            enable_nccl_comm_suspend=True,
            # Each sleep pins host memory anew, so that those calls are among them.
            additional_config={"sleep_mode": {"keep_host_backup": False}},
            distributed_executor_backend="mp",
            tensor_parallel_size=2,
        ) as llm:
            yield llm


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "sample",
    [True, pytest.param(False, marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
    ids=["sample", "all"],
)
def test_ranks_agree_whichever_call_fails_on_one(ranks, level, sample) -> None:
    sweep = Sweep(ranks, level, lambda: tokens(ranks, FEW[:1], 4))
    faults = list(sweep.faults())
    if sample:
        faults = first_of_each_name(iter(faults))
    for fault in faults:
        sweep.run(fault)
    print(f"level {level}: {len(faults)} faults, {dict(sweep.results)}")
    assert len(faults) >= 20
    assert sweep.results["reported"] >= 10
    assert "did not happen" not in sweep.results
