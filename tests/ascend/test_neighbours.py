# SPDX-License-Identifier: Apache-2.0
"""Other processes allocate and free device memory while an engine starts beside vllm-ascend."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.neighbours import Neighbour
from helpers.patience import wait_for
from helpers.server import SMALL, Server

HBM_MIB = 1024
SHARE = "0.4"


@pytest.fixture
def machine(monkeypatch) -> dict[str, str]:
    """A simulated machine for processes that share its device."""
    monkeypatch.setenv("NPU_SIM_MACHINE", f"ascend-neighbours-{os.getpid()}")
    monkeypatch.setenv("NPU_SIM_HBM_GIB", str(HBM_MIB // 1024))
    return {"VLLM_SERVER_DEV_MODE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def at(folder: Path, moment: str) -> Path:
    """Wait until a server's start is held at this step; returns the file that holds it."""
    file = folder / moment
    wait_for(file.exists, moment, 240)
    return file


def test_a_start_bears_what_others_take_and_give_back(tiny_model, tmp_path, machine):
    """At first nothing is free; later a server sleeps, wakes and sleeps again beside it."""
    options = ("--enable-sleep-mode", "--enforce-eager", "--dtype", "float32", *SMALL)
    options += ("--gpu-memory-utilization", SHARE)
    waiting = ("--additional-config", '{"sleep_mode": {"wake_timeout_s": 600}}')
    moments = ("before load_weights", "before _dummy_run", "after profile_run")
    stops = {"STOP_FOLDER": str(tmp_path), "STOP_MOMENTS": ",".join(moments)}
    extension = ("--worker-extension-cls", "helpers.neighbours.StopsAtMoments")
    logs = a_log, b_log = tmp_path / "a", tmp_path / "b"
    b_log.touch()

    def start_b() -> Server:
        env = {**machine, **stops}
        return Server(tiny_model, *options, *waiting, *extension, log=b_log, env=env)

    with (
        Server(tiny_model, *options, log=a_log, env=machine) as a,
        ThreadPoolExecutor(1) as pool,
        ExitStack() as stack,
    ):
        text = a.complete()
        neighbour = Neighbour()
        stack.callback(neighbour.end)
        neighbour.take_all()
        starting = pool.submit(start_b)
        wait_for(lambda: " s to start: Free memory" in b_log.read_text(), "b waits for memory", 240)
        neighbour.hold(0)
        stop = at(tmp_path, "before load_weights")
        a.post("/sleep")
        stop.unlink()
        stop = at(tmp_path, "before _dummy_run")
        a.post("/wake_up")
        assert a.complete() == text
        stop.unlink()
        stop = at(tmp_path, "after profile_run")
        a.post("/sleep?level=1")
        stop.unlink()
        with starting.result() as b:
            assert b.complete() == text
            a.post("/wake_up")
            assert (a.complete(), b.complete()) == (text, text)
    a_cache, b_cache = (re.findall(r"KV cache size: (\S+) tokens", log.read_text()) for log in logs)
    assert a_cache == b_cache != []
