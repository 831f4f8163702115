# SPDX-License-Identifier: Apache-2.0
"""A proxy that starts vLLM's own servers, with admin doors, on one simulated NPU."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers.fleet import Fleet
from helpers.models import make_model
from helpers.patience import wait_for
from helpers.server import SMALL

KEY = "key-of-the-doors-of-both"
SLEEP_MODE = '{"sleep_mode": {"chunk_mib": 2, "admin_port": ${ADMIN_PORT}}}'


def entry(model: str, name: str, **more) -> dict:
    serve = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(make_model(model)))
    where = ("--host", "127.0.0.1", "--port", "${PORT}", "--served-model-name", name)
    options = ("--enable-sleep-mode", "--dtype", "float32", *SMALL)
    memory = ("--gpu-memory-utilization", "0.4", "--additional-config", SLEEP_MODE)
    return {"command": [*serve, *where, *options, *memory], "devices": 0, **more}


def text(fleet: Fleet, model: str) -> str:
    answer = fleet.ask(model, "The future of AI is")
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def weights_on_device(fleet: Fleet, model: str) -> int:
    return weights(fleet, model)["device"]


def weights_on_host(fleet: Fleet, model: str) -> int:
    return weights(fleet, model)["host"]


def weights(fleet: Fleet, model: str) -> dict[str, int]:
    door = fleet.status()[model]["admin"]
    answer = httpx.get(f"{door}/sleep_status", headers={"Authorization": f"Bearer {KEY}"})
    (rank,) = answer.json()["ranks"]
    return rank["tags"]["weights"]


def wait_for_states(fleet: Fleet, **states: str) -> None:
    wait_for(lambda: fleet.states() == states, f"{states}", 240)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_models_with_one_command(tmp_path):
    models = {
        "model-a": entry("tiny-qwen2", "model-a", preload=True),
        "model-b": entry("tiny-llama", "model-b", level=2),
    }
    machine = {"NPU_SIM_MACHINE": f"fleet-{os.getpid()}", "NPU_SIM_HBM_GIB": "1"}
    with Fleet(tmp_path, models, SLEEP_ADMIN_KEY=KEY, **machine) as fleet:
        fleet.users.timeout = fleet.admin.timeout = 600
        wait_for_states(fleet, **{"model-a": "awake", "model-b": "stopped"})
        texts = {name: text(fleet, name) for name in models}
        assert texts["model-a"] != texts["model-b"]
        assert fleet.states() == {"model-a": "asleep", "model-b": "awake"}
        assert weights_on_device(fleet, "model-a") == 0 < weights_on_device(fleet, "model-b")
        pids = {name: fleet.status()[name]["pid"] for name in models}

        fleet.process.kill()
        fleet.process.wait()
        fleet.start()
        wait_for_states(fleet, **{"model-a": "asleep", "model-b": "awake"})
        for name in ("model-a", "model-b"):
            assert text(fleet, name) == texts[name]
        assert weights_on_device(fleet, "model-a") == 0
        assert {name: fleet.status()[name]["pid"] for name in models} == pids

        with ThreadPoolExecutor() as pool:
            long = {"model": "model-b", "prompt": "x", "max_tokens": 450, "ignore_eos": True}
            running = pool.submit(fleet.users.post, "/v1/completions", json=long)
            wait_for(lambda: fleet.status()["model-b"]["in_flight"] == 1)
            os.kill(pids["model-b"], signal.SIGKILL)
            assert running.result().status_code == 502
        assert text(fleet, "model-b") == texts["model-b"]
        assert fleet.status()["model-b"]["deaths"] == 1
        assert text(fleet, "model-a") == texts["model-a"]

        # Idle: down to level 2 and up again, and to its end and up again.
        fleet.write({"model-a": models["model-a"] | {"sleep_after": 0.5, "deep_sleep_after": 1}})
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: fleet.status()["model-a"]["level"] == 2, "level 2", 60)
        assert weights_on_host(fleet, "model-a") == 0
        assert text(fleet, "model-a") == texts["model-a"]
        assert fleet.status()["model-a"]["pid"] == pids["model-a"]
        fleet.write({"model-a": models["model-a"] | {"stop_after": 1}})
        fleet.process.send_signal(signal.SIGHUP)
        wait_for_states(fleet, **{"model-a": "stopped"})
        assert text(fleet, "model-a") == texts["model-a"]

        assert KEY not in fleet.log.read_text()
        fleet.end()
        assert fleet.started() == []
