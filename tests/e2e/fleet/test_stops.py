# SPDX-License-Identifier: Apache-2.0
"""An operator stops servers of the proxy. The servers are stand-ins for vLLM. About 8 seconds."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from helpers.fleet import Fleet, runs, stand_in
from helpers.patience import wait_for


@pytest.fixture
def doors(tmp_path) -> tuple[Path, Path]:
    return tmp_path / "door of a", tmp_path / "door of b"


@pytest.fixture
def fleet(tmp_path, doors) -> Iterator[Fleet]:
    waits = [("--waits-for", str(door)) for door in doors]
    models = {
        "a": stand_in(tmp_path, "a", *waits[0], devices=0),
        "b": stand_in(tmp_path, "b", *waits[1], devices=1, preload=True),
        "c": stand_in(tmp_path, "c", devices=2),
    }
    with Fleet(tmp_path, models) as fleet:
        yield fleet


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def stop(fleet: Fleet, model: str) -> httpx.Response:
    return fleet.admin.post("/stop", params={"model": model})


def test_a_stop_during_a_start_is_no_failure(fleet, doors, threads):
    wait_for(lambda: "b starts 1" in fleet.events(), "b starts")
    assert fleet.states()["b"] == "starting"
    answer = stop(fleet, "b")
    assert (answer.status_code, answer.json()["state"]) == (200, "stopped")
    doors[1].touch()
    assert fleet.ask("b").status_code == 200  # it has not to rest
    # One that waits is served by the next start.
    waits = threads.submit(fleet.ask, "a")
    wait_for(lambda: "a starts 0" in fleet.events(), "a starts")
    assert fleet.status()["a"]["queued"] == 1
    assert stop(fleet, "a").status_code == 200
    doors[0].touch()
    assert waits.result().status_code == 200
    for name in ("a", "b"):
        server = fleet.status()[name]
        assert (server["starts"], server["deaths"], server["error"]) == (2, 0, "")
        assert fleet.events().count(f"{name} starts {'ab'.index(name)}") == 2
    assert fleet.metric("failures_total") == 0


def test_running_requests_end_first(fleet, tmp_path, threads):
    pid = fleet.pid_of("c")
    runs_on = threads.submit(fleet.ask, "c", f"until {tmp_path / 'end'}")
    wait_for(lambda: fleet.status()["c"]["in_flight"] == 1, "the request runs")
    assert fleet.status()["c"]["closing"] is False
    stops = threads.submit(stop, fleet, "c")
    wait_for(lambda: fleet.status()["c"]["closing"], "the stop is asked for")
    waits = threads.submit(fleet.ask, "c")  # for the next start
    wait_for(lambda: fleet.status()["c"]["queued"] == 1, "another request waits")
    assert runs(pid) and not stops.done()
    (tmp_path / "end").touch()
    assert runs_on.result().json()["pid"] == pid
    assert stops.result().status_code == 200
    assert waits.result().json()["pid"] != pid
    server = fleet.status()["c"]
    assert (server["starts"], server["deaths"], server["closing"]) == (2, 0, False)
    assert fleet.events().count("c starts 2") == 2


def test_the_end_of_the_proxy_answers_a_stop(tmp_path, threads):
    entry = stand_in(tmp_path, "a", "--ignores-sigterm", stop_timeout_s=3600)
    with Fleet(tmp_path, {"a": entry}, "--grace-s", "3600") as fleet:
        fleet.pid_of("a")
        stops = threads.submit(stop, fleet, "a")
        wait_for(lambda: "a ignores SIGTERM" in fleet.events(), "the stop")
        fleet.process.terminate()
        answer = stops.result()
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the proxy ends"
