# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep`` and the proxy at level 2, with a server whose weights come from a trainer."""

import json
import os
from collections.abc import Iterator

import pytest
from helpers.cli import vllm_sleep
from helpers.models import make_model
from helpers.proxy import Proxy, text, url
from helpers.server import SMALL, Server

OPTIONS = ("--enable-sleep-mode", "--dtype", "float32", *SMALL, "--gpu-memory-utilization", "0.4")
TRANSFER = ("--weight-transfer-config", '{"backend": "safetensors"}')
TRAINED = "the weights (source: trainer, version: step-1)"


@pytest.fixture(scope="module")
def servers(tiny_model, other_model, tmp_path_factory) -> Iterator[list[Server]]:
    """A server that trainers update (``old`` and ``new`` are its answers before and after), and one
    with another model."""
    logs = tmp_path_factory.mktemp("servers")
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"trained-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
    }
    llama = make_model("tiny-llama")
    with (
        Server(tiny_model, *OPTIONS, *TRANSFER, log=logs / "trained", env=env) as trained,
        Server(llama, *OPTIONS, log=logs / "other", env=env) as other,
    ):
        trained.old, other.text = trained.complete(), other.complete()
        trained.post("/init_weight_transfer_engine", json={"init_info": {}})
        train(trained, other_model, "first")
        trained.new = trained.complete()
        assert trained.new != trained.old
        yield [trained, other]


@pytest.fixture
def pair(servers, other_model) -> list[Server]:
    """Both servers, after a trainer has sent weights to one, and while the other one sleeps."""
    trained, other = servers
    other.post("/sleep")
    trained.post("/wake_up?tags=weights")
    train(trained, other_model, "step-1")
    trained.post("/wake_up")
    return servers


def train(server: Server, model, version: str) -> None:
    server.post("/start_weight_update")
    path = str(model / "model.safetensors")
    server.post("/update_weights", json={"update_info": {"path": path}})
    server.post("/finish_weight_update", json={"weight_version": version})
    server.post("/reset_prefix_cache")


def version(server: Server) -> str:
    found = server.http.get("/weight_info").json()["weight_version"]
    assert server.rank_status()["weights"]["version"] == found
    return found


def on_device(server: Server) -> int:
    return server.rank_status()["tags"]["weights"]["device"]


def test_sleep_and_switch_at_level_2_are_refused_before_anything_is_lost(pair):
    trained, other = pair
    assert "weights from trainer, version step-1" in vllm_sleep("status", url(trained)).stdout
    first = f"weights from checkpoint {other.model}, version default"
    assert first in vllm_sleep("status", url(other)).stdout
    for command in (
        ("sleep", url(trained), "--level", "2"),
        ("switch", url(trained), url(other), "--level", "2"),
        ("switch", url(trained), url(other), "--level", "2", "--overlap"),
    ):
        done = vllm_sleep(*command, code=1)
        assert f"{TRAINED} are in no checkpoint" in done.stderr and "level 1" in done.stderr
        assert (trained.is_sleeping(), other.is_sleeping()) == (False, True)

    vllm_sleep("switch", url(trained), url(other))
    assert other.complete() == other.text
    vllm_sleep("sleep", url(trained), "--level", "2", code=1)  # the backup is the only copy
    vllm_sleep("switch", url(other), url(trained), "--level", "2")
    assert (trained.complete(), version(trained)) == (trained.new, "step-1")


def test_a_wake_is_refused_until_the_trainer_sends_them_again(pair, other_model):
    trained, other = pair
    vllm_sleep("wake", url(other))
    vllm_sleep("sleep", url(trained), "--level", "2", "--discard-trained")
    for command in (
        ("wake", url(trained)),
        ("switch", url(other), url(trained)),
        ("switch", url(other), url(trained), "--overlap"),
    ):
        error = json.loads(vllm_sleep(*command, "--json", code=1).stdout)["error"]
        assert f"{TRAINED} were lost" in error and "Wake the tag weights alone" in error
        assert trained.is_sleeping() and on_device(trained) == 0
        assert not other.is_sleeping()
    vllm_sleep("wake", url(trained), "--tags", "weights")
    train(trained, other_model, "step-2")
    vllm_sleep("wake", url(trained))
    assert (trained.complete(), version(trained)) == (trained.new, "step-2")


@pytest.mark.parametrize("command", [("wake",), ("switch",), ("switch", "--overlap")])
def test_a_roll_back_that_is_asked_for(pair, command):
    trained, other = pair
    vllm_sleep("switch", url(trained), url(other), "--level", "2", "--discard-trained")
    urls = [url(other), url(trained)] if command[0] == "switch" else [url(trained)]
    vllm_sleep(*command, *urls, "--discard-trained")
    assert (trained.complete(), version(trained)) == (trained.old, "default")
    log = trained.log.read_text()
    assert f"reload_weights loaded {trained.model} in place of {TRAINED}" in log


def test_the_proxy_puts_it_to_sleep_at_level_1(pair):
    trained, other = pair
    with Proxy(pair, "--level", "2") as proxy:
        assert text(proxy.complete(trained)).startswith(trained.new)
        assert text(proxy.complete(other)).startswith(other.text)
        usage = trained.rank_status()["tags"]["weights"]
        assert usage["device"] == 0 and usage["offloaded"] > 0
        assert text(proxy.complete(trained)).startswith(trained.new)
        assert version(trained) == "step-1"
        assert other.rank_status()["tags"]["weights"]["discarded"] > 0

        # Something else discards them: what the proxy could load is not what was served.
        assert text(proxy.complete(other)).startswith(other.text)
        trained.post("/sleep?level=2")
        answer = proxy.complete(trained)
        assert answer.status_code == 503
        assert f"{TRAINED} were lost" in answer.json()["error"]["message"]
        assert trained.is_sleeping() and on_device(trained) == 0
        assert text(proxy.complete(other)).startswith(other.text)
        vllm_sleep("wake", url(trained), "--discard-trained")
        assert text(proxy.complete(trained)).startswith(trained.old)
