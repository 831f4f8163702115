# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep`` against two servers on one simulated NPU on which only one fits awake."""

import json
import os
from typing import NamedTuple

import httpx
import pytest
from helpers.cli import vllm_sleep
from helpers.server import SMALL, Server

OPTIONS = ("--enable-sleep-mode", *SMALL, "--gpu-memory-utilization", "0.75")
LINK_GBPS = "0.03"  # Slow enough that copies outweigh everything else of a switch.


class Pair(NamedTuple):
    a: Server
    b: Server
    env: dict[str, str]


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory):
    """Server a, awake, and b, asleep at level 1; b waits for memory when it wakes."""
    logs = tmp_path_factory.mktemp("pair")
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"cli-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
        "NPU_SIM_LINK_GBPS": LINK_GBPS,
    }
    wait = ("--additional-config", '{"sleep_mode": {"wake_timeout_s": 30, "chunk_mib": 2}}')
    with Server(tiny_model, *OPTIONS, *wait, log=logs / "b", env=env) as b:
        b.text = b.complete()
        b.post("/sleep")
        with Server(tiny_model, *OPTIONS, log=logs / "a", env=env) as a:
            a.text = a.complete()
            yield Pair(a, b, env)


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def report(*arguments: str) -> dict:
    return json.loads(vllm_sleep(*arguments, "--json").stdout)


@pytest.fixture
def a_is_awake(pair):
    """Before and after each test, a is awake and b sleeps at level 1."""
    a, b, _ = pair
    yield
    vllm_sleep("sleep", url(b))
    vllm_sleep("wake", url(a))


def test_status_tells_who_sleeps(pair):
    a, b, _ = pair
    servers = report("status", url(a), url(b))["servers"]
    assert [server["is_sleeping"] for server in servers] == [False, True]
    assert [server["models"] for server in servers] == [[a.model], [b.model]]
    assert servers[1]["ranks"][0]["tags"]["weights"]["device"] == 0
    lines = vllm_sleep("status", url(a), url(b)).stdout.splitlines()
    assert "awake" in lines[0] and "asleep" in lines[1]
    assert "weights 0 MiB on the device" in lines[1]


def test_switch_there_and_back(pair, a_is_awake):
    a, b, _ = pair
    done = vllm_sleep("switch", url(a), url(b))
    assert done.stdout.startswith(f"switched from {url(a)} to {url(b)} in ")
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["sleep", "wake"]
    assert a.is_sleeping() and b.complete() == b.text
    steps = report("switch", url(b), url(a), "--quiet")["steps"]
    assert [(step["url"], step["step"]) for step in steps] == [(url(b), "sleep"), (url(a), "wake")]
    assert b.is_sleeping() and a.complete() == a.text


def test_after_level_2_weights_are_loaded_before_the_kv_cache_wakes(pair, a_is_awake):
    a, b, _ = pair
    report("switch", url(a), url(b), "--level", "2")
    assert a.rank_status()["tags"]["weights"]["host"] == 0
    steps = report("switch", url(b), url(a))["steps"]
    assert [step["step"] for step in steps if step["url"] == url(a)] == [
        "wake weights",
        "reload_weights",
        "wake",
        "reset_prefix_cache",
    ]
    assert a.complete() == a.text


@pytest.mark.parametrize("command", [("wake",), ("switch",), ("switch", "--overlap")])
def test_a_load_that_failed_is_made_up_for(pair, a_is_awake, command):
    a, b, _ = pair
    a.post("/sleep", params={"level": 2})
    a.post("/wake_up", params={"tags": "weights"})
    body = {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}}
    # On a separate connection, which the server closes.
    assert httpx.post(f"{url(a)}/collective_rpc", json=body, timeout=60).status_code == 500
    assert a.rank_status()["parameters_without_content"] > 20
    urls = [url(b), url(a)] if command[0] == "switch" else [url(a)]
    steps = [step["step"] for step in report(*command, *urls)["steps"] if step["url"] == url(a)]
    assert steps == ["wake weights", "reload_weights", "wake", "reset_prefix_cache"]
    assert a.complete() == a.text


def steps_overlap(done: dict) -> bool:
    return sum(step["seconds"] for step in done["steps"]) > done["seconds"]


def test_the_steps_overlap_and_are_as_right(pair, a_is_awake):
    a, b, _ = pair
    assert not steps_overlap(report("switch", url(a), url(b)))
    vllm_sleep("switch", url(b), url(a))

    def there_and_back() -> bool:
        there = report("switch", url(a), url(b), "--overlap")
        assert a.is_sleeping() and b.complete() == b.text
        # a does not wait for memory: the command repeats its wake until b has gone.
        back = report("switch", url(b), url(a), "--overlap")
        assert b.is_sleeping() and a.complete() == a.text
        return steps_overlap(there) and steps_overlap(back)

    # A busy machine may delay one step until the other one has ended, but not each time.
    assert any(there_and_back() for _ in range(20))


def test_overlap_at_level_2(pair, a_is_awake):
    a, b, _ = pair
    report("switch", url(a), url(b), "--overlap", "--level", "2")
    assert b.complete() == b.text
    report("switch", url(b), url(a), "--overlap", "--level", "2")
    assert a.complete() == a.text
    report("switch", url(a), url(b), "--overlap")
    assert b.complete() == b.text


def test_a_wake_without_room_is_refused_and_said(pair):
    a, b, _ = pair
    vllm_sleep("switch", url(a), url(b))
    refused = vllm_sleep("wake", url(a), code=1)
    assert "503" in refused.stderr and "bytes free and" in refused.stderr
    answer = json.loads(vllm_sleep("wake", url(a), "--json", code=1).stdout)
    assert answer["ok"] is False and "bytes free and" in answer["error"]
    vllm_sleep("switch", url(b), url(a))
    assert a.complete() == a.text


def test_tags_and_bad_tags(pair, a_is_awake):
    a, *_ = pair
    vllm_sleep("sleep", url(a))
    vllm_sleep("wake", url(a), "--tags", "weights")
    assert a.is_sleeping()
    assert "'nonsense'" in vllm_sleep("wake", url(a), "--tags", "nonsense", code=1).stderr
    vllm_sleep("wake", url(a), "--tags", "kv_cache")
    assert a.complete() == a.text


@pytest.mark.slow
def test_a_stock_server(pair, a_is_awake, tiny_model, tmp_path):
    """vLLM's own endpoints: no /sleep_status, and bodies are ignored."""
    a, *_ = pair
    a.post("/sleep")
    (tmp_path / "sitecustomize.py").write_text(
        "from vllm_sleep_ascend import patches\n"
        "from vllm_sleep_ascend.front_end import server\n"
        "own = [p for p in patches.EVERYWHERE if p.wrapper is server.with_middleware]\n"
        "patches.EVERYWHERE = tuple(p for p in patches.EVERYWHERE if p not in own)\n"
        "patches.DEVELOPMENT = ()\n"
    )
    env = {**pair.env, "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{tmp_path}"}
    with Server(tiny_model, *OPTIONS, log=tmp_path / "stock", env=env, cold=True) as stock:
        assert stock.http.get("/sleep_status").status_code == 404
        expected = stock.complete()
        (server,) = report("status", url(stock))["servers"]
        assert server["ranks"] is None and server["is_sleeping"] is False
        report("switch", url(stock), url(a), "--level", "2")
        done = vllm_sleep("switch", url(a), url(stock), "--level", "2", "--overlap")
        assert "stock vLLM" in done.stderr and "reload_weights" in done.stderr
        assert stock.complete() == expected
        assert a.is_sleeping()
        vllm_sleep("sleep", url(stock))
        assert "reload" not in vllm_sleep("wake", url(stock)).stderr
        assert stock.complete() == expected


def test_nothing_sleeps_for_a_server_that_is_not_there(pair):
    a, *_ = pair
    nobody = "http://127.0.0.1:9"
    assert "cannot connect" in vllm_sleep("switch", url(a), nobody, code=3).stderr
    assert not a.is_sleeping()
    assert vllm_sleep("status", nobody, code=3).stdout == ""


@pytest.mark.parametrize(
    "arguments", [(), ("sleep",), ("sleep", "ftp://x"), ("sleep", "http://x", "--level", "3")]
)
def test_wrong_usage(arguments):
    assert "usage:" in vllm_sleep(*arguments, code=2).stderr
