# SPDX-License-Identifier: Apache-2.0
"""Communicators of sleeping ranks: their device memory is freed, and a wake creates them again."""

import gc
import os
import re

import pytest
import torch
from helpers import MIB
from helpers.control_group import control_group
from helpers.engine import engine, few
from helpers.logs import messages_of
from helpers.ranks import (
    assert_all,
    assert_cycles_leave_nothing,
    brief_meetings,
    fail_on,
    process_id,
    status,
)
from helpers.reference import hf_few
from torch.distributed import distributed_c10d

from vllm_sleep_ascend import _camem, safe_while_asleep
from vllm_sleep_ascend.memory.pool import trim, use_pool
from vllm_sleep_ascend.policy import POLICY
from vllm_sleep_ascend.rank.host_budget import host_need

# Bytes of a communicator: of a group by HCCL_BUFFSIZE (conftest.py), of a pair of pipeline stages
# by P2P_HCCL_BUFFSIZE.
BUFFERS = 2 * 4 * MIB
LAYOUTS = {"tp2": {"tensor_parallel_size": 2}, "pp2": {"pipeline_parallel_size": 2}}


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tiny_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCCL_CONNECT_TIMEOUT", "5")
        patch.setenv("P2P_HCCL_BUFFSIZE", "4")
        # Nothing else, such as an earlier engine of this process, holds memory on these devices.
        patch.setenv("NPU_SIM_MACHINE", f"communicators-{request.param}-{os.getpid()}")
        with engine(
            tiny_model,
            enable_sleep_mode=True,
            distributed_executor_backend="mp",
            additional_config={"sleep_mode": {"release_communicators": True}},
            **LAYOUTS[request.param],
        ) as llm:
            yield llm


def held(llm) -> list[int]:
    return [rank["resident"]["communicators"] for rank in status(llm)]


def hold(worker, size: int) -> None:
    """Make the weights larger, so that a limit between one and both ranks is not too close."""
    with use_pool("weights"):
        worker.more_weights = torch.ones(size, dtype=torch.uint8, device="npu")


def drop(worker) -> None:
    del worker.more_weights
    trim()


def needed(worker) -> int:
    # A sleep first drops what a reference cycle still holds, and memory without tensors.
    gc.collect()
    trim()
    return host_need(worker.sleep_mode_backend, worker.rank, POLICY[1]).needed


def prepare(worker) -> int:
    """Prepare as a start with this option does. Returns the pinned bytes."""
    backend = worker.sleep_mode_backend
    options = backend._config
    backend.configure(options.model_copy(update={"host_backup": "prepared"}))
    backend.prepare()
    assert _camem.wait_prepared(30)
    backend.configure(options)
    return _camem.pinned_host_bytes()


def test_host_memory_is_looked_at_for_all_ranks_together(ranks) -> None:
    """Before the first sleep there is enough for one rank, but not for both."""
    ranks.collective_rpc(hold, args=(64 * MIB,))
    needs = ranks.collective_rpc(needed)
    limit = max(needs) * 3 // 2
    with control_group(limit, ranks.collective_rpc(process_id)):
        with pytest.raises(MemoryError) as refused:
            ranks.sleep(level=1)
        text = str(refused.value)
        assert "the backups of ranks 0, 1 on host" in text and "use level 2" in text
        assert f"need {needs[0]} + {needs[1]} = {sum(needs)} bytes of host memory" in text
        available = int(re.search(r"together and (\d+) are available", text)[1])
        assert max(needs) < available <= limit < sum(needs)
        assert_all(ranks, "RUNNING")
        assert [rank["host_backup"] for rank in status(ranks)] == [0, 0]
    with control_group(min(needs) // 2, ranks.collective_rpc(process_id)):
        assert ranks.collective_rpc(prepare) == [0, 0]
    ranks.collective_rpc(drop)


def test_buffers_come_free_and_come_back(ranks, tiny_model) -> None:
    expected = hf_few(tiny_model)
    assert few(ranks) == expected
    awake = held(ranks)
    assert min(awake) >= BUFFERS and len(set(awake)) == 1
    for level in (1, 2):
        ranks.sleep(level=level)
        assert held(ranks) == [0, 0]
        for rank in status(ranks):
            # The process holds only torch's memory outside the pools.
            assert rank["total"] - rank["free"] == rank["resident"]["other"]
            assert rank["resident"]["context"] == rank["resident"]["graphs"] == 0
        ranks.wake_up(tags=["weights"])
        assert held(ranks) == awake
        if level == 2:
            ranks.collective_rpc("reload_weights")
        ranks.wake_up()
        ranks.reset_prefix_cache()
        assert held(ranks) == awake
        assert few(ranks) == expected


def test_cycles_leave_nothing_behind(ranks, tiny_model) -> None:
    assert_cycles_leave_nothing(ranks, tiny_model)


def test_a_wake_that_fails_leaves_all_ranks_asleep(ranks, tiny_model) -> None:
    expected = hf_few(tiny_model)
    awake = held(ranks)
    ranks.sleep(level=1)
    for rank in (0, 1):
        for call in ("HcclGetRootInfo", "HcclCommInitRootInfoConfig"):
            if rank == 1 and call == "HcclGetRootInfo":
                continue  # rank 0 creates it
            fail_on(ranks, rank, f"{call}:1:4")
            named = rf"rank {rank}, device {rank}: .*{call[4:8]}"
            with brief_meetings(ranks), pytest.raises(RuntimeError, match=named):
                ranks.wake_up()
            fail_on(ranks, rank, "")
            assert_all(ranks, "SUSPENDED")
            assert held(ranks) == [0, 0]
    ranks.wake_up()
    assert_all(ranks, "RUNNING")
    assert held(ranks) == awake
    assert few(ranks) == expected


class FailsOnce:
    """A group of ranks whose first destruction fails."""

    failed = False

    def _get_backend(self, device):
        return self

    def _get_stream_id(self, is_pair, peer=-1):
        return -1 if is_pair else 0

    def _delete_tcpstore_key(self) -> None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("the store is gone")

    def abort_hccl_comm(self, reason) -> None:
        """Nothing to destroy."""

    def get_hccl_comm_name(self, rank, make) -> str:
        return ""


def add_group(worker, rank: int) -> None:
    if worker.rank == rank:
        world = distributed_c10d._world
        worker.failing = FailsOnce()
        world.pg_map[worker.failing] = next(b for b in world.pg_map.values() if "hccl" in b[0])
        world.pg_group_ranks[worker.failing] = {0: 0, 1: 1}


def remove_group(worker, rank: int) -> None:
    if worker.rank == rank:
        assert worker.failing.failed
        del distributed_c10d._world.pg_map[worker.failing]
        del distributed_c10d._world.pg_group_ranks[worker.failing]


def test_a_release_that_fails_leaves_all_ranks_as_they_were(ranks, tiny_model) -> None:
    """Including communicators that some ranks had already destroyed."""
    expected = hf_few(tiny_model)
    awake = held(ranks)
    for rank in (0, 1):
        ranks.collective_rpc(add_group, args=(rank,))
        with pytest.raises(RuntimeError, match=rf"rank {rank}, device {rank}: the store is gone"):
            ranks.sleep(level=1)
        ranks.collective_rpc(remove_group, args=(rank,))
        assert_all(ranks, "RUNNING")
        assert held(ranks) == awake
        assert few(ranks) == expected


@safe_while_asleep
def listen(worker) -> None:
    worker.listener = messages_of("rank.communicators")
    worker.heard = worker.listener.__enter__()


@safe_while_asleep
def heard(worker) -> list[str]:
    messages, worker.heard[:] = list(worker.heard), []
    return messages


def test_memory_that_hccl_keeps_is_a_warning_and_shown(ranks, tiny_model) -> None:
    """This is the last test, because that memory is lost for the process."""
    expected = hf_few(tiny_model)
    awake = held(ranks)
    ranks.collective_rpc(listen)
    for rank in (0, 1):
        fail_on(ranks, rank, "HcclCommDestroy:1:4:*")
        ranks.sleep(level=1)
        fail_on(ranks, rank, "")
        assert_all(ranks, "SUSPENDED")
        kept = [awake[r] if r <= rank else 0 for r in (0, 1)]
        assert held(ranks) == kept
        messages = ranks.collective_rpc(heard)
        assert messages[1 - rank] == []
        (message,) = messages[rank]
        assert "HCCL kept memory of 1 of 1 groups" in message and "(ranks 0, 1)" in message
        assert f"holds {kept[rank]} bytes" in message
        ranks.wake_up()
        assert_all(ranks, "RUNNING")
        assert held(ranks) == [now + then for now, then in zip(kept, awake, strict=True)]
        assert few(ranks) == expected
