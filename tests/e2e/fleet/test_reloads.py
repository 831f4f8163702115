# SPDX-License-Identifier: Apache-2.0
"""SIGHUP: the proxy reads models.yaml again. The servers are stand-ins for vLLM."""

import itertools
import signal
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.fleet import Fleet, stand_in
from helpers.patience import wait_for

from vllm_sleep_ascend.proxy.launch import ports


def reload(fleet: Fleet, models: dict | str) -> None:
    """Write the file, and wait until the proxy has read it."""
    if isinstance(models, str):
        fleet.file.write_text(models)
    else:
        fleet.write(models)
    before = len(ends_of_reloads(fleet))
    fleet.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(ends_of_reloads(fleet)) > before, "the reload")


def ends_of_reloads(fleet: Fleet) -> list[str]:
    lines = fleet.log.read_text().splitlines()
    return [line for line in lines if "nothing was changed" in line or " removed" in line]


def test_added_removed_and_kept(tmp_path):
    door = tmp_path / "door"
    models = {"a": stand_in(tmp_path, "a", devices=0), "b": stand_in(tmp_path, "b", devices=1)}
    with Fleet(tmp_path, models) as fleet, ThreadPoolExecutor() as pool:
        kept = fleet.pid_of("a")
        fleet.pid_of("b")
        running = pool.submit(fleet.ask, "b", f"until {door}")
        wait_for(lambda: fleet.status()["b"]["in_flight"] == 1)
        reload(fleet, {"a": models["a"], "c": stand_in(tmp_path, "c", devices=2)})
        assert fleet.ask("b").status_code == 404
        assert fleet.status()["b"]["retiring"]
        assert fleet.pid_of("c")
        assert not running.done()
        door.touch()
        assert running.result().status_code == 200
        wait_for(lambda: "b" not in fleet.states())
        assert fleet.events()[-1] == "b ends"
        assert fleet.pid_of("a") == kept
        assert {process.pid for process in fleet.started()} == {kept, fleet.pid_of("c")}
        assert fleet.metric('state{server="b"') == 0
        assert "1 added, 0 changed, 1 removed" in fleet.log.read_text()


def test_a_changed_server_restarts_once_its_requests_have_ended(tmp_path):
    door = tmp_path / "door"
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet, ThreadPoolExecutor() as pool:
        before = fleet.pid_of("a")
        running = pool.submit(fleet.ask, "a", f"until {door}")
        wait_for(lambda: fleet.status()["a"]["in_flight"] == 1)
        reload(fleet, {"a": stand_in(tmp_path, "a", env={"A": "b"})})
        reload(fleet, {"a": stand_in(tmp_path, "a", env={"A": "c"})})
        waiting = pool.submit(fleet.pid_of, "a")
        wait_for(lambda: fleet.status()["a"]["queued"] == 1)
        assert [process.pid for process in fleet.started()] == [before]
        door.touch()
        assert running.result().json()["pid"] == before
        assert waiting.result() != before
        (server,) = fleet.started()
        assert server.environ()["A"] == "c"
        assert fleet.events() == ["a starts", "a ends", "a starts"]
        wait_for(lambda: len(fleet.started()) == 1)
        assert fleet.metric('state{server="a",state="awake"}') == 1


def test_a_changed_server_that_waits_for_its_first_start_goes_first(tmp_path):
    """Also if the one that takes its place has another device, which is free."""
    door = tmp_path / "door"
    models = {"a": stand_in(tmp_path, "a", devices=0), "b": stand_in(tmp_path, "b", devices=0)}
    with Fleet(tmp_path, models) as fleet, ThreadPoolExecutor() as pool:
        running = pool.submit(fleet.pid_of, "b", f"until {door}")
        try:
            wait_for(lambda: fleet.status()["b"]["in_flight"] == 1)
            first = pool.submit(fleet.pid_of, "a")
            wait_for(lambda: fleet.status()["a"]["queued"] == 1)
            reload(fleet, models | {"a": stand_in(tmp_path, "a", devices=1)})
            second = pool.submit(fleet.pid_of, "a")
            wait_for(lambda: fleet.status()["a"]["queued"] == 1)
        finally:
            door.touch()
        assert running.result()
        assert first.result() != second.result()
        of_a = [event for event in fleet.events() if event[0] == "a"]
        assert of_a == ["a starts 0", "a ends", "a starts 1"]


def test_what_needs_no_other_process(tmp_path):
    entry = stand_in(tmp_path, "a")
    with Fleet(tmp_path, {"a": entry}) as fleet:
        pid = fleet.pid_of("a")
        reload(fleet, {"a": entry | {"aliases": ["x"], "level": 2, "wake_timeout_s": 9}})
        assert fleet.pid_of("a") == pid
        assert fleet.ask("x").json()["pid"] == pid
        reload(fleet, {"a": entry | {"preload": True}})
        assert fleet.ask("x").status_code == 404
        assert fleet.pid_of("a") == pid
        assert fleet.events() == ["a starts"]


def test_a_file_with_errors_changes_nothing(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        pid = fleet.pid_of("a")
        reload(fleet, "models:\n  b:\n    level: 7\n")
        assert f"{fleet.file}:3: models.b.level: 7: there is no such level" in fleet.log.read_text()
        fleet.file.unlink()
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: f"{fleet.file}:1: cannot be read" in fleet.log.read_text())
        assert fleet.pid_of("a") == pid
        reload(fleet, {"a": stand_in(tmp_path, "a")})
        assert fleet.pid_of("a") == pid
        assert fleet.events() == ["a starts"]


def test_a_removed_server_that_starts(tmp_path):
    """Nobody waits for it any more, so it ends; a request that waits is served."""
    doors = tmp_path / "one", tmp_path / "two"
    models = {
        "one": stand_in(tmp_path, "one", "--waits-for", str(doors[0]), devices=0, preload=True),
        "two": stand_in(tmp_path, "two", "--waits-for", str(doors[1]), devices=1),
        "three": stand_in(tmp_path, "three", devices=2),
    }
    with Fleet(tmp_path, models) as fleet, ThreadPoolExecutor() as pool:
        waiting = pool.submit(fleet.pid_of, "two")
        wait_for(lambda: sorted(fleet.events()) == ["one starts 0", "two starts 1"])
        reload(fleet, {"three": models["three"]})
        wait_for(lambda: "one ends" in fleet.events())
        wait_for(lambda: "one" not in fleet.states())
        doors[1].touch()
        assert waiting.result()
        wait_for(lambda: list(fleet.states()) == ["three"])
        assert fleet.started() == []


def _ends_after(
    running: Future, event: str, door: Path, fleet: Fleet, models: dict[str, dict]
) -> None:
    """Server a, which a reload removes after the event, ends only once the door has let its request
    end."""
    try:
        wait_for(lambda: event in fleet.events())
        reload(fleet, {"b": models["b"]})
        assert fleet.pid_of("b")  # the schedule has seen it
        assert "a ends" not in fleet.events()
    finally:
        door.touch()
    running.result()
    wait_for(lambda: list(fleet.states()) == ["b"])
    assert fleet.events()[-1] == "a ends"


def test_a_request_beside_the_turns_is_not_lost(tmp_path):
    door = tmp_path / "door"
    models = {"a": stand_in(tmp_path, "a"), "b": stand_in(tmp_path, "b")}
    body = {"model": "a", "prompt": f"until {door}"}
    with Fleet(tmp_path, models) as fleet, ThreadPoolExecutor() as pool:
        fleet.pid_of("a")
        running = pool.submit(fleet.users.post, "/tokenize", json=body)
        _ends_after(running, "a tokenizes", door, fleet, models)
        assert running.result().json() == {"tokens": []}


def test_a_stored_response_that_streams_is_not_lost(tmp_path):
    door = tmp_path / "door"
    models = {"a": stand_in(tmp_path, "a"), "b": stand_in(tmp_path, "b")}
    with Fleet(tmp_path, models) as fleet, ThreadPoolExecutor() as pool:
        fleet.pid_of("a")
        url = f"/v1/responses/stored?until={door}"
        running = pool.submit(fleet.users.get, url)
        _ends_after(running, "a streams", door, fleet, models)
        assert running.result().json() == {"id": "stored"}


def test_a_background_response_is_not_lost(tmp_path):
    """Also one that keeps the turn no longer: the server sleeps before it ends, which waits."""
    done = tmp_path / "done"
    models = {
        "a": stand_in(tmp_path, "a", devices=0),
        "b": stand_in(tmp_path, "b", devices=1),
    }
    body = {"model": "a", "input": str(done), "background": True}
    before = "from vllm_sleep_ascend.proxy.http import background; background.LONGEST_S = 0.3"
    with Fleet(tmp_path, models, before=before) as fleet:
        try:
            assert fleet.users.post("/v1/responses", json=body).json()["status"] == "queued"
            wait_for(lambda: fleet.status()["a"]["in_flight"] == 0)
            reload(fleet, {"b": models["b"]})
            wait_for(lambda: "a waits before it sleeps" in fleet.events())
            assert fleet.pid_of("b")
            assert fleet.users.get("/v1/responses/r").status_code in (200, 404)
        finally:
            done.touch()
        wait_for(lambda: list(fleet.states()) == ["b"])
        assert fleet.events()[-2:] == ["a sleeps", "a ends"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_wakes_from_the_level_at_which_it_went_to_sleep(tmp_path, killed):
    """Stock vLLM does not tell it, and has no weights after level 2 until it loads them."""
    entry = stand_in(tmp_path, "a")
    with Fleet(tmp_path, {"a": entry | {"level": 2}}) as fleet:
        pid = fleet.pid_of("a")
        fleet.admin.post("/sleep", params={"model": "a"})
        if killed:
            fleet.process.kill()
            fleet.process.wait()
            fleet.write({"a": entry | {"level": 1}})
            fleet.start()
        else:
            reload(fleet, {"a": entry | {"level": 1}})
        assert fleet.pid_of("a") == pid
        assert fleet.events() == [
            *("a starts", "a sleeps at level 2", "a loads its weights", "a wakes")
        ]


def test_a_removed_server_of_somebody_else_sleeps_before_it_is_forgotten(tmp_path):
    """After a sleep that failed it is tried again."""
    allows, port = tmp_path / "allows", ports.free(set())
    command = stand_in(tmp_path, "a", "--fails-sleep-until", str(allows))["command"]
    server = subprocess.Popen([word.replace("${PORT}", str(port)) for word in command])
    url, b = {"url": f"http://127.0.0.1:{port}"}, stand_in(tmp_path, "b", devices=1)
    before = "from vllm_sleep_ascend.proxy import schedule; schedule._RETRY_S = 0.2"
    try:
        wait_for(lambda: not ports.is_free(port))
        with Fleet(tmp_path, {"a": url | {"devices": 0}, "b": b}, before=before) as fleet:
            fleet.pid_of("a")
            reload(fleet, {"b": b})
            wait_for(lambda: fleet.events().count("a does not sleep") >= 2)
            assert fleet.status()["a"]["retiring"]
            allows.touch()
            wait_for(lambda: list(fleet.states()) == ["b"])
            assert fleet.events()[-1] == "a sleeps"
    finally:
        server.kill()
        server.wait()


def test_no_request_is_lost(tmp_path):
    def entries(version: int) -> dict:
        changed = stand_in(tmp_path, "b", env={"VERSION": str(version)})
        return {"a": stand_in(tmp_path, "a"), "b": changed}

    ended = threading.Event()
    with Fleet(tmp_path, entries(0), "--turn-s", "0.05") as fleet, ThreadPoolExecutor() as pool:

        def client(model: str) -> set[int]:
            pids = set()
            for number in itertools.count():
                pids.add(fleet.pid_of(model))
                if ended.is_set() and number > 3:
                    return pids
            raise AssertionError

        clients = [pool.submit(client, model) for model in "abab"]
        for version in (1, 2, 3):
            starts = fleet.events().count("b starts")
            reload(fleet, entries(version))
            wait_for(lambda before=starts: fleet.events().count("b starts") > before)
        ended.set()
        pids = [client.result() for client in clients]
        assert len(pids[0] | pids[2]) == 1
        assert len(pids[1] | pids[3]) >= 2
        assert fleet.metric('requests_total{server="a",status="200"}') > 0
        wait_for(lambda: len(fleet.started()) == 2)
