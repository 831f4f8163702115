# SPDX-License-Identifier: Apache-2.0
"""Engines of several ranks, each on a simulated NPU of its own: the tokens are those of one device,
and sleep frees the memory of every device."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from engines import engine
from ranks import (
    RESIDENT,
    assert_all,
    assert_cycles_leave_nothing,
    assert_tokens_survive_sleep,
    fail_on,
    process_id,
    status,
)
from reference import PROMPTS, hf_greedy, vllm_greedy
from server import SMALL, Server
from support import MIB

from vllm_sleep_ascend.sim import control

LAYOUTS = {
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tiny_model):
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        distributed_executor_backend="mp",
        **LAYOUTS[request.param],
    ) as llm:
        yield llm


def test_every_rank_sleeps_and_the_tokens_stay(ranks, tiny_model) -> None:
    devices = [rank["device"] for rank in status(ranks)]
    assert devices == list(range(len(devices)))
    assert_tokens_survive_sleep(ranks, tiny_model)


def test_cycles_leave_nothing_behind(ranks, tiny_model) -> None:
    assert_cycles_leave_nothing(ranks, tiny_model)


# One call of each step that a rank goes through: what it waits for, copies, unmaps and maps.
SLEEP_FAULTS = ("aclrtSynchronizeDevice", "aclrtMemcpyAsync", "aclrtUnmapMem")
WAKE_FAULTS = ("aclrtMallocPhysical", "aclrtMapMem", "aclrtMemcpyAsync")


def test_a_fault_on_one_rank_keeps_all_as_they_were(ranks, tiny_model) -> None:
    prompts = PROMPTS[:2]
    expected = hf_greedy(tiny_model, prompts, 4)
    last = len(status(ranks)) - 1
    where = f"rank {last}, device {last}"
    for level in (1, 2):
        for call in SLEEP_FAULTS:
            if level == 2 and call == "aclrtMemcpyAsync":
                continue
            fail_on(ranks, last, f"{call}:1:507899")
            with pytest.raises(RuntimeError, match=where):
                ranks.sleep(level=level)
            fail_on(ranks, last, "")
            assert_all(ranks, "RUNNING")
            assert vllm_greedy(ranks, prompts, 4) == expected
    ranks.sleep(level=1)
    for call in WAKE_FAULTS:
        fail_on(ranks, last, f"{call}:1:507899")
        with pytest.raises(RuntimeError, match=where):
            ranks.wake_up()
        fail_on(ranks, last, "")
        assert_all(ranks, "SUSPENDED")
    ranks.wake_up()
    assert_all(ranks, "RUNNING")
    assert vllm_greedy(ranks, prompts, 4) == expected


def test_a_rank_that_dies_while_it_falls_asleep_is_an_error_and_no_hang(tiny_model) -> None:
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
    ) as llm:
        victim = llm.collective_rpc(process_id)[1]
        fail_on(llm, 1, "aclrtMemcpyAsync:1:delay_ms=20000")
        killer = threading.Timer(1, os.kill, (victim, signal.SIGKILL))
        killer.start()
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            llm.sleep(level=1)
        assert time.monotonic() - started < 15


def test_a_rank_that_hangs_is_an_error_in_bounded_time(tiny_model) -> None:
    expected = hf_greedy(tiny_model, PROMPTS[:2], 4)
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
            assert vllm_greedy(llm, PROMPTS[:2], 4) == expected

        # It does not: the other says so, and then the engine ends, which frees the devices.
        victim = llm.collective_rpc(process_id)[0]
        os.kill(victim, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 0 hangs"):
            llm.sleep(level=1)
        assert time.monotonic() - started < 40
        with pytest.raises(RuntimeError, match="Executor failed"):
            llm.wake_up()


class FailingReplica:
    """Of the server's workers, by ``--worker-extension-cls``."""

    def fail_on_replica(self, replica: int, rules: str) -> None:
        mine = self.parallel_config.data_parallel_index == replica  # type: ignore[attr-defined]
        control.set_faults(rules if mine else "")


def test_both_replicas_of_a_data_parallel_server_sleep(tiny_model, tmp_path) -> None:
    prompts = PROMPTS[:2]
    expected = hf_greedy(tiny_model, prompts)

    def used_of(device: int) -> int:
        # mem_get_info(device) would leave the process at that device: mem_get_info(0) after
        # mem_get_info(1) tells what device 1 has.
        torch.npu.set_device(device)
        free, total = torch.npu.mem_get_info()
        return total - free

    def used() -> list[int]:
        return [used_of(device) for device in (1, 0)]

    def answers(server: Server, replica: int, tokens: int = 24) -> list[list[int]]:
        body = {"model": server.model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return [
            server.post(
                "/v1/completions",
                json={**body, "prompt": prompt, "return_token_ids": True},
                headers={"X-data-parallel-rank": str(replica)},
            )["choices"][0]["token_ids"]
            for prompt in prompts
        ]

    before = used()
    options = ("--enable-sleep-mode", "--dtype", "float32", "--data-parallel-size", "2", *SMALL)
    options += ("--api-server-count", "1")
    memory = ("--kv-cache-memory-bytes", str(64 * MIB), "--gpu-memory-utilization", "0.4")
    options += ("--worker-extension-cls", f"{__name__}.{FailingReplica.__name__}")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    with Server(tiny_model, *options, *memory, log=tmp_path / "log", env=env) as server:
        assert answers(server, 0) == answers(server, 1) == expected
        assert all(now - then > 64 * MIB for now, then in zip(used(), before, strict=True))
        for level in (1, 2):
            server.post("/sleep", params={"level": level})
            assert all(now - then < RESIDENT for now, then in zip(used(), before, strict=True))
            server.post("/wake_up", params={"tags": "weights"})
            if level == 2:
                server.post("/collective_rpc", json={"method": "reload_weights"})
            server.post("/wake_up")
            server.post("/reset_prefix_cache")
            assert answers(server, 0) == answers(server, 1) == expected

        def cycle() -> tuple[list[int], list[int]]:
            server.post("/sleep", params={"level": 1})
            asleep = used()
            server.post("/wake_up")
            first = [answer[:1] for answer in expected]
            assert answers(server, 0, 1) == answers(server, 1, 1) == first
            return asleep, used()

        # Ten times: nothing piles up, asleep or awake.
        figures = [cycle() for _ in range(10)]
        assert figures[1:] == figures[:1] * 9

        def states() -> list[tuple[int, int, str]]:
            ranks = server.http.get("/sleep_status").json()["ranks"]
            return [(rank["engine"], rank["device"], rank["state"]) for rank in ranks]

        def fail(replica: int, rules: str) -> None:
            body = {"method": "fail_on_replica", "args": [replica, rules]}
            server.post("/collective_rpc", json=body)

        def state() -> str:
            return server.http.get("/sleep_status").json()["state"]

        # A replica that fails is named, the others stay as they are, and the call can be repeated.
        both = {state: [(0, 0, state), (1, 1, state)] for state in ("RUNNING", "SUSPENDED")}
        assert (state(), states()) == ("awake", both["RUNNING"])
        for replica in (0, 1):
            fail(replica, "aclrtUnmapMem:1:507899")
            answer = server.http.post("/sleep", params={"level": 1})
            assert answer.status_code == 503
            assert "sleep failed on 1 of 2 data-parallel engines" in answer.text
            assert f"engine {replica}: " in answer.text
            fail(replica, "")
            other = 1 - replica
            mixed = {replica: "RUNNING", other: "SUSPENDED"}
            assert states() == [(0, 0, mixed[0]), (1, 1, mixed[1])]
            assert (state(), server.is_sleeping()) == ("partly_asleep", True)
            server.post("/sleep", params={"level": 1})
            assert (state(), states()) == ("asleep", both["SUSPENDED"])
            fail(replica, "aclrtMapMem:1:507899")
            answer = server.http.post("/wake_up")
            assert answer.status_code == 503 and f"engine {replica}: " in answer.text
            fail(replica, "")
            assert (state(), server.is_sleeping()) == ("partly_asleep", True)
            server.post("/wake_up")
            assert (state(), states()) == ("awake", both["RUNNING"])
            assert not server.is_sleeping()
            assert answers(server, 0) == answers(server, 1) == expected
