# SPDX-License-Identifier: Apache-2.0
"""Engines of several ranks: what tests ask of all of them, and faults on one."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from helpers import MIB
from helpers.engine import few, tokens
from helpers.reference import hf_few, hf_greedy
from vllm_sleep_ascend import safe_while_asleep
from vllm_sleep_ascend.sim import control

# What may stay on a device: two buffers of 4 MiB for each communicator of a group and of 20 MiB for
# each pair of pipeline stages, and the little that torch holds outside the pools.
RESIDENT = 64 * MIB


def status(llm: Any) -> list[dict]:
    return llm.collective_rpc("sleep_status")


@safe_while_asleep
def process_id(worker: Any) -> int:
    return os.getpid()


def footprint(worker: Any) -> dict[str, int]:
    """What the rank holds, apart from the events and pinned blocks that torch keeps for reuse."""
    gc.collect()
    torch.npu.synchronize()
    torch.npu.empty_cache()
    counters = asdict(control.counters())
    del counters["events"], counters["pinned_bytes"]
    return {"free": torch.npu.mem_get_info()[0], **counters}


def fail_on(llm: Any, rank: int, rules: str) -> None:
    """Calls of this rank fail by these rules, "" for none, and those of the others do not."""
    llm.collective_rpc(_set_faults, args=(rank, rules))


@safe_while_asleep
def _set_faults(worker: Any, rank: int, rules: str) -> None:
    control.set_faults(rules if worker.rank == rank else "")


@contextmanager
def brief_meetings(llm: Any) -> Iterator[None]:
    """A rank waits a second for one that does not come to make a communicator.

    For what fails on one rank in any case: else a busy machine makes others late as well."""
    before = llm.collective_rpc(_connect_timeout, args=("1",))[0]
    try:
        yield
    finally:
        llm.collective_rpc(_connect_timeout, args=(before,))


@safe_while_asleep
def _connect_timeout(worker: Any, seconds: str) -> str:
    """The one before; HCCL reads it for each communicator."""
    before = os.environ["HCCL_CONNECT_TIMEOUT"]
    os.environ["HCCL_CONNECT_TIMEOUT"] = seconds
    return before


def assert_all(llm: Any, state: str) -> None:
    """Every rank is in this state, with all of its memory."""
    ranks = status(llm)
    assert [rank["state"] for rank in ranks] == [state] * len(ranks)
    for rank in ranks:
        for tag in rank["tags"].values():
            assert tag["device"] == (0 if state == "SUSPENDED" else tag["mapped"])
            assert tag["mapped"] == 0 or state == "RUNNING"


def assert_asleep(llm: Any, backup: bool) -> None:
    """Every rank sleeps and holds next to nothing of its device, with or without a backup of its
    weights on the host."""
    assert_all(llm, "SUSPENDED")
    for rank in status(llm):
        assert rank["total"] - rank["free"] < RESIDENT, rank
        assert (rank["tags"]["weights"]["host"] > 0) == backup, rank


def assert_tokens_survive_sleep(llm: Any, model: Path) -> None:
    """Of both levels: the tokens are the reference's before and after."""
    expected = hf_greedy(model)
    assert tokens(llm) == expected
    assert all(rank["total"] - rank["free"] > RESIDENT for rank in status(llm))

    llm.sleep(level=1)
    assert_asleep(llm, backup=True)
    llm.wake_up()
    assert tokens(llm) == expected

    llm.sleep(level=2)
    assert_asleep(llm, backup=False)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    assert tokens(llm) == expected


def assert_cycles_leave_nothing(llm: Any, model: Path) -> None:
    """Ten times asleep and awake: the tokens are the reference's, and nothing piles up."""
    expected = hf_few(model)

    def cycle() -> list:
        llm.sleep(level=1)
        llm.wake_up()
        assert few(llm) == expected
        return llm.collective_rpc(footprint)

    cycle()
    figures = [cycle() for _ in range(10)]
    assert figures[1:] == figures[:1] * 9
