# SPDX-License-Identifier: Apache-2.0
"""Sleep mode over HTTP, on a real server."""

import os
from pathlib import Path

import pytest
from helpers import MIB, ROOT, programs
from helpers.server import HBM_GIB, MEMORY, SMALL, Server, free_ports

pytestmark = pytest.mark.usefixtures("left_awake")


def held(server) -> int:
    """Device bytes of all processes."""
    status = server.rank_status()
    return status["total"] - status["free"]


def reload_weights(server) -> None:
    server.post("/collective_rpc", json={"method": "reload_weights"})


def test_the_guides_curl_sequence_as_written(server):
    text = server.complete()
    json = {"headers": {"Content-Type": "application/json"}}
    assert server.post("/sleep", content='{"level": "1"}', **json)["level"] == 1
    assert server.is_sleeping()
    assert server.post("/sleep", content='{"level": "2"}', **json)["level"] == 2
    assert server.post("/wake_up")["status"] == "awake"
    assert server.post("/wake_up?tags=weights")["status"] == "awake"
    assert not server.is_sleeping()
    body = {"model": server.model, "prompt": "Hi", "max_tokens": 7}
    answer = server.http.post("/v1/completions", json=body)  # level 2 discarded the weights
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    reload_weights(server)
    server.post("/reset_prefix_cache")
    assert server.complete() == text


def test_level_1_frees_the_device_and_keeps_the_text(server):
    text, awake = server.complete(), held(server)
    mapped = sum(tag["device"] for tag in server.rank_status()["tags"].values())
    server.post("/sleep")
    asleep = held(server)
    assert asleep < 64 * MIB < awake
    assert server.post("/is_sleeping") == {"is_sleeping": True}
    server.post("/wake_up")
    assert held(server) - asleep == mapped
    assert server.complete() == text


def test_it_sleeps_until_every_tag_is_awake(server):
    text = server.complete()
    server.post("/sleep?level=1")
    assert server.post("/wake_up?tags=weights")["status"] == "sleeping"
    assert server.is_sleeping()
    tags = server.rank_status()["tags"]
    assert tags["weights"]["discarded"] == tags["weights"]["offloaded"] == 0
    assert tags["kv_cache"]["mapped"] == 0
    assert server.post("/wake_up?tags=kv_cache")["status"] == "awake"
    assert not server.is_sleeping()
    assert server.complete() == text


def test_level_2_after_level_1_frees_the_host_copies(server):
    text = server.complete()
    server.post("/sleep?level=1")
    assert server.rank_status()["tags"]["weights"]["host"] > 0
    server.post("/sleep?level=2")
    assert server.rank_status()["tags"]["weights"]["host"] == 0
    server.post("/wake_up")
    reload_weights(server)
    server.post("/reset_prefix_cache")
    assert server.complete() == text


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/sleep?level=3", None, "sleep level 3 does not exist; use 0"),
        ("/sleep?level=one", None, "sleep level 'one' does not exist"),
        ("/sleep", '{"level": 7}', "sleep level 7 does not exist"),
        ("/sleep", '{"level": true}', "sleep level True does not exist"),
        ("/sleep?level=1", '{"level": 2}', "'1' in the query and 2 in the body"),
        ("/sleep?level=1&level=2", None, "level is '1' and '2' in the query; send one"),
        ("/sleep?mode=wait&mode=abort", None, "mode is 'wait' and 'abort' in the query"),
        ("/sleep", '{"lvl": 2}', "'lvl' is not an option here; use level, mode"),
        ("/sleep?lvl=2", None, "'lvl' is not an option here; use level, mode"),
        ("/wake_up?tag=weights", None, "'tag' is not an option here; use tags"),
        ("/release_kv_cache_memory?level=1", None, "'level' is not an option here"),
        ("/sleep", "level=2", "the body is not JSON"),
        ("/sleep", "[2]", "must be a JSON object"),
        ("/sleep?mode=kill", None, "use one of abort, wait, keep"),
        ("/wake_up?tags=wieghts", None, "use some of weights, kv_cache, scheduling"),
        ("/wake_up?tags=weights&tags=kv", None, "tag 'kv' does not exist"),
        ("/wake_up?tags=weights", '{"tags": ["kv_cache"]}', "send one"),
        ("/wake_up?tags=weights", "tags=weights", "the body is not JSON"),
    ],
)
def test_bad_input_is_a_400_with_the_allowed_values(server, path, body, message):
    answer = server.http.post(path, content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert not server.is_sleeping()
    assert server.complete()


def test_a_second_sleep_and_a_second_wake_do_nothing(server):
    text = server.complete()
    server.post("/sleep")
    server.post("/sleep")
    assert server.is_sleeping()
    server.post("/wake_up")
    server.post("/wake_up?tags=weights&tags=kv_cache", json={"tags": ["kv_cache", "weights"]})
    assert server.complete() == text


def test_level_0_pauses_scheduling_and_moves_no_memory(server):
    before = held(server)
    server.post("/sleep?level=0")
    assert server.is_sleeping()
    assert held(server) == before
    server.post("/wake_up?tags=scheduling")
    assert not server.is_sleeping()


def test_the_kv_cache_alone_can_be_released(server):
    text = server.complete()
    server.post("/sleep?level=0")
    server.post("/release_kv_cache_memory")
    tags = server.rank_status()["tags"]
    assert tags["kv_cache"]["device"] == 0
    assert tags["weights"]["device"] > 0
    assert server.is_sleeping()
    server.post("/wake_up?tags=kv_cache")
    assert server.complete() == text


def test_kv_cache_is_not_released_under_running_requests(server):
    answer = server.http.post("/release_kv_cache_memory")
    assert answer.status_code == 503
    assert "requires a completed pause first" in answer.json()["error"]["message"]
    assert server.complete()


def test_without_dev_mode_there_are_no_endpoints_and_without_the_flag_no_sleep(
    tiny_model, tmp_path
):
    env = {"NPU_SIM_MACHINE": f"plain-{os.getpid()}", "NPU_SIM_HBM_GIB": str(HBM_GIB)}
    with Server(
        tiny_model, "--enable-sleep-mode", *SMALL, *MEMORY, log=tmp_path / "a", env=env
    ) as s:
        for path in ("/sleep", "/wake_up"):
            assert s.http.post(path).status_code == 404
        for path in ("/is_sleeping", "/sleep_status"):
            assert s.http.get(path).status_code == 404
        assert s.complete()
    env["VLLM_SERVER_DEV_MODE"] = "1"
    with Server(tiny_model, *SMALL, *MEMORY, log=tmp_path / "b", env=env) as s:
        answer = s.http.post("/sleep")
        assert answer.status_code == 400
        assert "--enable-sleep-mode" in answer.json()["error"]["message"]
        assert not s.is_sleeping()
        assert s.http.get("/sleep_status").json()["ranks"][0]["enabled"] is False
        assert s.complete()


@pytest.mark.slow
def test_the_online_example(tiny_model):
    env = {
        **os.environ,
        "NPU_SIM_MACHINE": f"online-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}",
    }
    (port,) = free_ports(1)
    done = programs.run(
        [ROOT / "examples" / "online_sleep.sh", tiny_model, str(port), *SMALL, *MEMORY],
        240,
        env=env,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count('{"is_sleeping":true}') == 2
    assert done.stdout.count('{"is_sleeping":false}') == 1
    assert '"text_completion"' in done.stdout
