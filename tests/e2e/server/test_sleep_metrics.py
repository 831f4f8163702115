# SPDX-License-Identifier: Apache-2.0
"""``/metrics``, ``/sleep_status`` and ``/health`` of a server that sleeps or fails."""

import math
import os

import pytest
from helpers.faults import set_faults
from helpers.patience import wait_for
from helpers.server import HBM_GIB, MEMORY, SMALL, InBackground, Server
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.usefixtures("left_awake")


def samples(server, name: str) -> dict[tuple[str, ...], float]:
    """Values of a metric by the labels that differ between its samples."""
    text = server.http.get("/metrics").text
    return {
        tuple(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == name
    }


def sleep_state(server) -> set[str]:
    return {k[0] for k, value in samples(server, "vllm:engine_sleep_state").items() if value}


def tag_bytes(server, tag: str) -> dict[str, float]:
    """Bytes of a tag by state, zeros left out."""
    values = samples(server, "vllm:sleep_mode_bytes")
    return {state: v for (_, state, t), v in values.items() if t == tag and v}


def test_gauges_are_there_before_the_first_sleep_and_follow_partial_wakes(server):
    weights = tag_bytes(server, "weights")["mapped"]
    kv_cache = tag_bytes(server, "kv_cache")["mapped"]
    assert weights == server.rank_status()["tags"]["weights"]["mapped"]
    assert kv_cache > weights > 0
    assert sleep_state(server) == {"awake"}

    server.post("/sleep?level=1")
    assert sleep_state(server) == {"weights_offloaded"}
    assert tag_bytes(server, "weights") == {"offloaded": weights}
    assert tag_bytes(server, "kv_cache") == {"discarded": kv_cache}
    held = samples(server, "vllm:sleep_mode_held_bytes")
    assert held["device", "0", "weights"] == held["device", "0", "kv_cache"] == 0
    assert held["host", "0", "weights"] == weights

    server.post("/wake_up?tags=weights")
    assert sleep_state(server) == set()
    assert tag_bytes(server, "weights") == {"mapped": weights}
    assert tag_bytes(server, "kv_cache") == {"discarded": kv_cache}
    server.post("/wake_up?tags=kv_cache")
    assert sleep_state(server) == {"awake"}

    server.post("/sleep?level=1")
    server.post("/sleep?level=2")
    assert sleep_state(server) == {"discard_all"}
    server.post("/wake_up?tags=kv_cache")
    assert sleep_state(server) == {"discard_all"}
    server.post("/sleep?level=1")
    assert sleep_state(server) == {"discard_all"}
    server.post("/wake_up?tags=weights")
    server.post("/sleep?level=1")  # weights that were not loaded are still lost
    assert sleep_state(server) == {"discard_all"}
    server.post("/wake_up")
    server.post("/collective_rpc", json={"method": "reload_weights"})
    assert sleep_state(server) == {"awake"}

    server.post("/sleep?level=0")
    assert sleep_state(server) == set()
    server.post("/wake_up")


def test_operations_are_counted_when_they_succeed_and_when_they_fail(server, faults):
    def count(operation):
        name = "vllm:sleep_mode_operation_duration_seconds_count"
        return samples(server, name).get((operation,), 0)

    before = count("sleep"), count("wake")
    assert server.http.post("/sleep?level=7").status_code == 400
    assert server.http.post("/wake_up?tags=all").status_code == 400
    assert (count("sleep"), count("wake")) == before
    set_faults(faults, "aclrtUnmapMem:1:507899")
    assert server.http.post("/sleep").status_code == 503
    set_faults(faults, "")
    server.post("/sleep")
    server.post("/wake_up")
    assert (count("sleep"), count("wake")) == (before[0] + 2, before[1] + 1)
    assert set(samples(server, "vllm:sleep_mode_operations_in_flight").values()) == {0}


def test_status_tells_states_the_last_operation_and_the_last_error(server, faults):
    def status():
        return server.http.get("/sleep_status").json()

    assert status()["state"] == "awake"
    server.post("/sleep?level=0")
    assert (status()["state"], status()["is_sleeping"]) == ("paused", True)
    server.post("/wake_up")

    awake = status()["ranks"][0]
    assert awake["held"] <= awake["share"] == math.ceil(awake["total"] * 0.5)
    server.post("/sleep?level=1")
    rank = status()["ranks"][0]
    weights = rank["tags"]["weights"]["offloaded"]
    assert rank["held"] <= awake["held"] - weights
    assert rank["host_memory"]["needed"] == 0 < rank["host_memory"]["available"]
    operation = rank["last_operation"]
    assert status()["state"] == "asleep"
    assert rank["host_backup"] == sum(tag["host"] for tag in rank["tags"].values()) >= weights
    assert operation["operation"] == "sleep level 1"
    assert operation["tags"]["weights"]["offloaded"] == weights
    assert operation["copied_bytes"] >= weights
    assert operation["seconds"] > 0
    assert operation["copied_gb_per_s"] == pytest.approx(
        operation["copied_bytes"] / 1e9 / operation["seconds"], abs=0.001
    )

    set_faults(faults, "aclrtMallocPhysical:1:207001")
    assert server.http.post("/wake_up?tags=weights").status_code == 503
    set_faults(faults, "")
    error = status()["ranks"][0]["last_error"]
    assert (error["operation"], error["type"]) == ("wake", "DeviceOutOfMemoryError")
    assert "can be repeated" in error["message"]
    server.post("/wake_up?tags=weights")
    assert status()["ranks"][0]["last_error"] is None
    assert status()["state"] == "partly_asleep"
    server.post("/sleep?level=2")
    server.post("/wake_up")
    answer = status()
    assert answer["state"] == "awake_without_weights"
    assert answer["ranks"][0]["parameters_without_content"] > 20
    server.post("/collective_rpc", json={"method": "reload_weights"})
    server.post("/reset_prefix_cache")
    assert status()["state"] == "awake"


def test_options_refuse_requests_and_a_dead_engine_is_told_from_a_sleeping_one(
    server, tiny_model, tmp_path
):
    text = server.complete()
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",
        "NPU_SIM_MACHINE": f"refusing-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
    }
    options = '{"sleep_mode": {"while_asleep": "refuse", "after_level2": "refuse"}}'
    options = ("--enable-sleep-mode", "--additional-config", options, *SMALL, *MEMORY)
    options += ("--root-path", "/behind")
    with Server(tiny_model, *options, log=tmp_path / "log", env=env) as refusing:
        body = {"model": refusing.model, "prompt": "Hi", "max_tokens": 2}
        chat = {
            "model": refusing.model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 2,
        }

        def reason(answer):
            assert answer.status_code == 503, answer.text
            assert answer.headers["Retry-After"] == "1"
            return answer.json()["error"]["message"]

        def refused(path="/v1/completions", json=body):
            return reason(refusing.http.post(path, json=json))

        assert refusing.complete() == text
        refusing.post("/sleep?level=2")
        assert "the engine sleeps; wake it with" in refused()
        assert "the engine sleeps; wake it with" in refused(json={**body, "stream": True})
        assert "the engine sleeps; wake it with" in refused("/v1/chat/completions", chat)
        assert "the engine sleeps; wake it with" in refused("/behind/v1/completions")
        assert refusing.http.get("/health").status_code == 200
        assert refusing.http.get("/v1/models").status_code == 200
        refusing.post("/tokenize", json={"model": refusing.model, "prompt": "Hi"})
        refusing.post("/wake_up?tags=weights")
        assert "the engine sleeps; wake it with" in refused()
        assert refusing.post("/wake_up")["status"] == "awake"
        assert not refusing.is_sleeping()
        assert "parameters have not been loaded since" in refused()
        assert refusing.http.get("/sleep_status").json()["state"] == "awake_without_weights"
        refusing.post("/collective_rpc", json={"method": "reload_weights"})
        assert refusing.complete() == text

        # The engine itself refuses requests that have passed the server's check and wait.
        every_place = {**body, "n": 8, "max_tokens": 480, "ignore_eos": True}
        long = InBackground(refusing, "/v1/completions", json=every_place)
        wait_for(refusing.runs_requests, "the long request runs")
        queued = [
            InBackground(refusing, "/v1/completions", json=body),
            InBackground(refusing, "/v1/chat/completions", json=chat),
        ]
        waiting = "vllm:num_requests_waiting"
        wait_for(lambda: sum(samples(refusing, waiting).values()) == 2, "two requests wait")
        refusing.post("/sleep")
        for request in queued:
            assert "the engine sleeps; wake it with" in reason(request.answer())
        choices = long.answer().json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["abort"] * 8
        refusing.post("/wake_up")
        assert refusing.complete() == text

        refusing.post("/sleep")
        refusing.engine().kill()
        wait_for(lambda: refusing.http.get("/health").status_code != 200, "the death is noticed")
        assert refusing.http.get("/health").status_code == 503
        answer = refusing.http.get("/sleep_status")
        assert (answer.status_code, answer.json()["state"]) == (503, "dead")
        answer = refusing.http.post("/wake_up")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "EngineDeadError")
