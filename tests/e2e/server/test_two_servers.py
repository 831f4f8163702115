# SPDX-License-Identifier: Apache-2.0
"""Two servers share one NPU on which only one fits awake."""

import os

import pytest
from helpers import GIB, MIB
from helpers.patience import wait_for
from helpers.server import SMALL, Server

# Each takes 0.75 of the device, so two do not fit.
OPTIONS = ("--enable-sleep-mode", *SMALL, "--gpu-memory-utilization", "0.75")


@pytest.fixture
def env():
    return {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"shared-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
    }


def free(server) -> int:
    return server.http.get("/sleep_status").json()["ranks"][0]["free"]


def test_they_take_turns_and_a_killed_one_gives_its_memory_back(tiny_model, tmp_path, env):
    with Server(tiny_model, *OPTIONS, log=tmp_path / "a", env=env) as a:
        text = a.complete()
        alone = free(a)
        assert alone < 0.5 * GIB < GIB - alone
        a.post("/sleep")
        with Server(tiny_model, *OPTIONS, log=tmp_path / "b", env=env) as b:
            assert b.complete() == text

            refused = a.http.post("/wake_up")
            assert refused.status_code == 503
            error = refused.json()["error"]
            assert error["type"] == "DeviceOutOfMemoryError"
            assert "bytes free and" in error["message"]
            assert a.is_sleeping()

            b.post("/sleep")
            a.post("/wake_up")
            assert a.complete() == text
            a.post("/sleep")
            b.post("/wake_up")
            assert b.complete() == text

            before = free(a)
            b.kill()
            wait_for(lambda: free(a) - before > 400 * MIB, "the killed server's memory is free")
        a.post("/wake_up")
        assert free(a) == alone
        assert a.complete() == text
