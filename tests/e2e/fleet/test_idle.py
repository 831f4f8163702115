# SPDX-License-Identifier: Apache-2.0
"""Idle servers sleep, sleep deeper, and end. The servers are stand-ins for vLLM."""

import signal
from concurrent.futures import ThreadPoolExecutor

from helpers.fleet import Fleet, stand_in
from helpers.patience import patience, wait_for

NEVER = 3600.0


def soon() -> float:
    """Seconds in which nothing is idle while a test asks for it."""
    return 3.0 * patience()


def test_an_idle_server_sleeps_deeper(tmp_path):
    entry = stand_in(tmp_path, "a", "--reports-memory", sleep_after=0.2, deep_sleep_after=0.4)
    with Fleet(tmp_path, {"a": entry}) as fleet:
        pid = fleet.pid_of("a")
        for _ in range(2):
            wait_for(lambda: fleet.status()["a"]["level"] == 2)
            assert fleet.pid_of("a") == pid
        assert fleet.events()[:5] == [
            *("a starts", "a sleeps", "a sleeps at level 2", "a loads its weights", "a wakes")
        ]


def test_the_backup_of_an_idle_server_goes_to_disk(tmp_path):
    entry = stand_in(tmp_path, "a", "--reports-memory", sleep_after=0.2, deep_sleep_after=0.4)
    with Fleet(tmp_path, {"a": {**entry, "deep_sleep": "disk"}}) as fleet:
        pid = fleet.pid_of("a")
        wait_for(lambda: fleet.events()[1:] == ["a sleeps", "a sleeps to disk"])
        assert fleet.status()["a"]["level"] == 1
        assert fleet.pid_of("a") == pid
        assert fleet.events()[3] == "a wakes"


def test_an_idle_server_ends(tmp_path):
    entry = stand_in(tmp_path, "a", "--reports-memory", sleep_after=0.2)
    entry |= {"deep_sleep_after": 0.4, "stop_after": soon()}
    with Fleet(tmp_path, {"a": entry}) as fleet:
        first = fleet.pid_of("a")
        wait_for(lambda: fleet.states()["a"] == "stopped")
        assert fleet.started() == []
        assert fleet.events() == ["a starts", "a sleeps", "a sleeps at level 2", "a ends"]
        assert fleet.metric("sleeps_total") == 2
        assert fleet.pid_of("a") != first
        assert fleet.status()["a"]["deaths"] == 0


def test_a_server_that_does_not_tell_what_it_holds_sleeps_no_deeper(tmp_path):
    entry = stand_in(tmp_path, "a", sleep_after=0.1, deep_sleep_after=0.2, stop_after=soon())
    with Fleet(tmp_path, {"a": entry}) as fleet:
        fleet.pid_of("a")
        wait_for(lambda: fleet.states()["a"] == "stopped")
        assert fleet.events() == ["a starts", "a sleeps", "a ends"]


def test_a_server_that_sleeps_by_turns_ends_too(tmp_path):
    """Without its own sleep_after; the other one is used."""
    models = {"a": stand_in(tmp_path, "a"), "b": stand_in(tmp_path, "b")}
    with Fleet(tmp_path, models) as fleet:
        fleet.pid_of("a")
        other = fleet.pid_of("b")
        models["a"]["stop_after"] = 0.2
        fleet.write(models)
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: fleet.states() == {"a": "stopped", "b": "awake"})
        assert fleet.pid_of("b") == other
        assert fleet.events() == ["a starts", "a sleeps", "b starts", "a ends"]
        assert fleet.ask("a").status_code == 200


def test_the_time_starts_anew_with_the_proxy(tmp_path):
    entry = stand_in(tmp_path, "a", sleep_after=NEVER, stop_after=2 * NEVER)
    with Fleet(tmp_path, {"a": entry}, "--idle-s", "0.1") as fleet:
        pid = fleet.pid_of("a")
        fleet.process.kill()
        fleet.process.wait()
        fleet.start()
        wait_for(lambda: fleet.states() == {"a": "awake"})
        assert fleet.pid_of("a") == pid
        assert fleet.events() == ["a starts"]  # its own time, not that of --idle-s


def test_a_server_in_use_stays(tmp_path):
    """For longer than another one takes to end."""
    door = tmp_path / "door"
    models = {
        "a": stand_in(tmp_path, "a", devices=0, sleep_after=0.1, stop_after=0.2),
        "b": stand_in(tmp_path, "b", devices=1, sleep_after=0.2, stop_after=0.4),
    }
    with Fleet(tmp_path, models) as fleet, ThreadPoolExecutor() as pool:
        running = pool.submit(fleet.pid_of, "a", f"until {door}")
        try:
            wait_for(lambda: fleet.status()["a"]["in_flight"] == 1)
            fleet.pid_of("b")
            wait_for(lambda: "b ends" in fleet.events())
            assert fleet.states()["a"] == "awake"
            assert [event for event in fleet.events() if event[0] == "a"] == ["a starts 0"]
        finally:
            door.touch()
        assert running.result()
