# SPDX-License-Identifier: Apache-2.0
"""A data-parallel server: its replicas sleep together, and the one that fails is named."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import MIB
from helpers.patience import wait_for
from helpers.ranks import RESIDENT
from helpers.reference import PROMPTS, hf_greedy
from helpers.server import SMALL, InBackground, Server

from vllm_sleep_ascend import safe_while_asleep
from vllm_sleep_ascend.sim import control


class FailingReplica:
    """An extension of the server's workers (``--worker-extension-cls``)."""

    @safe_while_asleep
    def fail_on_replica(self, replica: int, rules: str) -> None:
        mine = self.parallel_config.data_parallel_index == replica  # type: ignore[attr-defined]
        control.set_faults(rules if mine else "")


@pytest.mark.slow
def test_both_replicas_of_a_data_parallel_server_sleep(tiny_model, tmp_path) -> None:
    prompts = PROMPTS[:2]
    expected = hf_greedy(tiny_model, prompts)

    def used_of(device: int) -> int:
        # mem_get_info(device) would leave that device current: mem_get_info(0) after
        # mem_get_info(1) reports device 1.
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
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
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

        server.post("/update_weight_version", json={"new_version": "named"})
        weights = {"source": "checkpoint", "path": server.model, "version": "named"}
        ranks = server.http.get("/sleep_status").json()["ranks"]
        assert [(rank["engine"], rank["weights"]) for rank in ranks] == [(0, weights), (1, weights)]
        assert server.http.get("/weight_info").json() == {"weight_version": "named"}

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

        # The user's own pause outlives the sleep of every replica.
        def is_paused() -> bool:
            return server.http.get("/is_paused").json()["is_paused"]

        server.post("/pause")
        server.post("/sleep", params={"level": 1})
        server.post("/wake_up")
        assert (state(), is_paused()) == ("paused", True)
        server.post("/resume")
        assert (state(), is_paused()) == ("awake", False)

        # So does one that comes while they sleep. A request that comes then waits for the wake.
        server.post("/sleep", params={"level": 1})
        server.post("/pause")
        assert (state(), is_paused()) == ("asleep", True)
        server.post("/wake_up")
        assert (state(), is_paused()) == ("paused", True)
        server.post("/resume")
        server.post("/sleep", params={"level": 1})
        body = {"model": server.model, "prompt": prompts[1], "max_tokens": 24, "temperature": 0}
        late = InBackground(
            server,
            "/v1/completions",
            json={**body, "ignore_eos": True, "return_token_ids": True},
            headers={"X-data-parallel-rank": "1"},
        )
        assert (state(), late.is_done()) == ("asleep", False)
        server.post("/wake_up")
        assert late.answer().json()["choices"][0]["token_ids"] == expected[1]

        # A sleep for which one replica waits is called off, also on the other, which sleeps.
        body = {"model": server.model, "prompt": prompts[0], "max_tokens": 400, "ignore_eos": True}
        to_one = {
            "json": {**body, "temperature": 0, "return_token_ids": True},
            "headers": {"X-data-parallel-rank": "1"},
        }
        (undisturbed,) = server.post("/v1/completions", **to_one)["choices"]
        for path in ("/resume", "/wake_up"):
            fail(1, "aclrtMemcpyAsync:1:delay_ms=20:*")  # so that it still runs when 0 sleeps
            request = InBackground(server, "/v1/completions", **to_one)
            wait_for(server.runs_requests, "the request runs")
            sleep = InBackground(server, "/sleep?level=1&mode=wait")
            ended = sleep.is_done
            wait_for(lambda ended=ended: ended() or state() == "partly_asleep", "replica 0 sleeps")
            assert not sleep.is_done(), sleep.answer().text
            server.post(path)
            assert (state(), states()) == ("awake", both["RUNNING"])
            assert not request.is_done()
            assert sleep.answer().status_code == 503
            assert "on 1 of 2 data-parallel engines: engine 1: " in sleep.answer().text
            assert "called the sleep off" in sleep.answer().text
            fail(1, "")
            assert request.answer().json()["choices"] == [undisturbed]
        assert answers(server, 0) == answers(server, 1) == expected


@pytest.mark.slow
def test_replicas_that_are_idle_sleep_and_requests_wake_them(tiny_model, tmp_path) -> None:
    (expected,) = hf_greedy(tiny_model, PROMPTS[:1])
    sleep_mode = {"idle_sleep_s": 1, "wake_on_request": True}
    options = ("--enable-sleep-mode", "--dtype", "float32", "--data-parallel-size", "2", *SMALL)
    options += ("--additional-config", json.dumps({"sleep_mode": sleep_mode}))
    memory = ("--kv-cache-memory-bytes", str(64 * MIB), "--gpu-memory-utilization", "0.4")
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    with Server(tiny_model, *options, *memory, log=tmp_path / "log", env=env) as server:
        body = {"model": server.model, "max_tokens": len(expected), "temperature": 0}
        body |= {"prompt": PROMPTS[0], "ignore_eos": True, "return_token_ids": True}

        def tokens(replica: int) -> list[int]:
            headers = {"X-data-parallel-rank": str(replica)}
            (choice,) = server.post("/v1/completions", json=body, headers=headers)["choices"]
            return choice["token_ids"]

        def states() -> list[str]:
            return [rank["state"] for rank in server.http.get("/sleep_status").json()["ranks"]]

        for replica in (0, 1):
            wait_for(lambda: states() == ["SUSPENDED"] * 2, "both replicas sleep")
            assert tokens(replica) == expected
        assert tokens(0) == tokens(1) == expected
        wait_for(lambda: states() == ["SUSPENDED"] * 2, "both replicas sleep again")
