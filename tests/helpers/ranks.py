# SPDX-License-Identifier: Apache-2.0
"""Engines with several ranks: assertions on all ranks, and faults on one."""

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

# What a sleeping rank may hold: two buffers for each communicator, of 4 MiB in a group or 20 MiB
# between two pipeline stages, and the little that torch holds outside the pools.
RESIDENT = 64 * MIB


def status(llm: Any) -> list[dict]:
    return llm.collective_rpc("sleep_status")


@safe_while_asleep
def process_id(worker: Any) -> int:
    return os.getpid()


def footprint(worker: Any) -> dict[str, int]:
    """What the rank holds, without the events and pinned blocks that torch keeps for reuse."""
    gc.collect()
    torch.npu.synchronize()
    torch.npu.empty_cache()
    counters = asdict(control.counters())
    del counters["events"], counters["pinned_bytes"]
    return {"free": torch.npu.mem_get_info()[0], **counters}


def fail_on(llm: Any, rank: int, rules: str) -> None:
    """Set the fault rules of this rank, and remove those of the others."""
    llm.collective_rpc(_set_faults, args=(rank, rules))


@safe_while_asleep
def _set_faults(worker: Any, rank: int, rules: str) -> None:
    control.set_faults(rules if worker.rank == rank else "")


@contextmanager
def brief_meetings(llm: Any) -> Iterator[None]:
    """Ranks wait only a second for each other to create a communicator.

    Use it only if a rank fails anyway: on a busy machine other ranks may be late too.
    """
    before = llm.collective_rpc(_connect_timeout, args=("1",))[0]
    try:
        yield
    finally:
        llm.collective_rpc(_connect_timeout, args=(before,))


@safe_while_asleep
def _connect_timeout(worker: Any, seconds: str) -> str:
    """Set HCCL's timeout for later communicators, and return the previous one."""
    before = os.environ["HCCL_CONNECT_TIMEOUT"]
    os.environ["HCCL_CONNECT_TIMEOUT"] = seconds
    return before


def assert_all(llm: Any, state: str) -> None:
    """Every rank is in this state with all of its memory."""
    ranks = status(llm)
    assert [rank["state"] for rank in ranks] == [state] * len(ranks)
    for rank in ranks:
        for tag in rank["tags"].values():
            assert tag["device"] == (0 if state == "SUSPENDED" else tag["mapped"])
            assert tag["mapped"] == 0 or state == "RUNNING"


def assert_asleep(llm: Any, backup: bool) -> None:
    """Every rank sleeps with almost no device memory, with or without a backup on the host."""
    assert_all(llm, "SUSPENDED")
    for rank in status(llm):
        assert rank["total"] - rank["free"] < RESIDENT, rank
        assert (rank["tags"]["weights"]["host"] > 0) == backup, rank


def assert_tokens_survive_sleep(llm: Any, model: Path) -> None:
    """At both levels the tokens equal the reference before and after a sleep."""
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
    """In ten cycles the tokens equal the reference, and no memory accumulates."""
    expected = hf_few(model)

    def cycle() -> list:
        llm.sleep(level=1)
        llm.wake_up()
        assert few(llm) == expected
        return llm.collective_rpc(footprint)

    cycle()
    figures = [cycle() for _ in range(10)]
    assert figures[1:] == figures[:1] * 9
