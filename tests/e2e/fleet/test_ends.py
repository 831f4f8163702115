# SPDX-License-Identifier: Apache-2.0
"""Servers that die, and a proxy that ends them. The servers are stand-ins for vLLM."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
from helpers.fleet import Fleet, runs, stand_in
from helpers.patience import wait_for


def test_a_server_that_dies_starts_again(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet, ThreadPoolExecutor() as pool:
        first = fleet.pid_of("a")
        running = pool.submit(fleet.ask, "a", f"until {tmp_path / 'never'}")
        wait_for(lambda: fleet.status()["a"]["in_flight"] == 1)
        assert fleet.ask("a", "die").status_code == 502
        assert running.result().status_code == 502
        wait_for(lambda: fleet.states()["a"] == "awake")  # without a request
        second = fleet.pid_of("a")
        assert first != second
        assert fleet.events() == ["a starts", "a dies", "a starts"]
        assert fleet.metric("deaths_total") == 1
        assert "was ended by SIGKILL" in fleet.log.read_text()


def test_a_process_that_listens_no_longer_is_killed_and_starts_again(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        first = fleet.pid_of("a")
        assert fleet.ask("a", "become another program").status_code == 502
        assert runs(first)
        assert fleet.pid_of("a") != first
        assert not runs(first)
        assert fleet.status()["a"]["deaths"] == 1
        assert "a: its engine is gone; it gets SIGKILL" in fleet.log.read_text()


def test_requests_wait_for_a_server_that_starts_again(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        for _ in range(3):
            before = fleet.pid_of("a")
            assert fleet.ask("a", "die").status_code == 502
            wait_for(lambda: fleet.states()["a"] != "awake")
            assert fleet.pid_of("a") != before
        assert fleet.status()["a"]["deaths"] == 3


def test_a_server_that_died_asleep_takes_nobody_s_turn(tmp_path):
    models = {"a": stand_in(tmp_path, "a"), "b": stand_in(tmp_path, "b")}
    with Fleet(tmp_path, models) as fleet:
        sleeps = fleet.pid_of("a")
        awake = fleet.pid_of("b")
        os.kill(sleeps, signal.SIGKILL)
        wait_for(lambda: fleet.states()["a"] == "stopped")
        for _ in range(20):
            assert fleet.pid_of("b") == awake
        assert fleet.events() == ["a starts", "a sleeps", "b starts"]
        assert fleet.pid_of("a") != sleeps
        assert fleet.states() == {"a": "awake", "b": "asleep"}


def test_what_a_dead_server_leaves_behind_is_killed(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a", "--with-child")}) as fleet:
        pid = fleet.pid_of("a")
        (child,) = (process.pid for process in psutil.Process(pid).children())
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not runs(child))
        wait_for(lambda: fleet.pid_of("a") != pid)


def test_a_proxy_that_ends_lets_requests_end_and_then_servers(tmp_path):
    door = tmp_path / "door"
    models = {"a": stand_in(tmp_path, "a"), "b": stand_in(tmp_path, "b", "--with-child")}
    models["b"]["stop_timeout_s"] = 2
    with Fleet(tmp_path, models, "--turn-s", "0") as fleet, ThreadPoolExecutor() as pool:
        fleet.pid_of("b")
        fleet.pid_of("a")
        running = pool.submit(fleet.ask, "a", f"until {door}")
        wait_for(lambda: fleet.status()["a"]["in_flight"] == 1)
        waiting = pool.submit(fleet.pid_of, "b")
        wait_for(lambda: fleet.status()["b"]["queued"] == 1)
        fleet.process.terminate()
        wait_for(lambda: not serves(fleet))
        assert not running.done()
        door.touch()
        assert running.result().status_code == 200
        assert waiting.result()
        assert fleet.process.wait(60) == 0
        assert fleet.started() == []
        assert "a ends" in fleet.events() and "b ends" in fleet.events()
        assert list(fleet.state.glob("*.json")) == []


def serves(fleet: Fleet) -> bool:
    with contextlib.suppress(Exception):
        return fleet.users.get("/health").status_code == 200
    return False


def test_a_server_that_ignores_sigterm_is_killed(tmp_path):
    entry = stand_in(tmp_path, "a", "--ignores-sigterm", "--with-child", stop_timeout_s=2)
    with Fleet(tmp_path, {"a": entry}) as fleet:
        fleet.pid_of("a")
        assert len(fleet.started()) == 2
        fleet.end()
        assert fleet.started() == []
        assert fleet.events() == ["a starts", "a ignores SIGTERM"]
        assert "did not end within 2 s; it gets SIGKILL" in fleet.log.read_text()


def test_a_process_that_sigkill_does_not_end(tmp_path):
    """As one that waits for its driver. Requests for its device fail, and the proxy can end."""
    before = (
        "import signal\n"
        "from vllm_sleep_ascend.proxy.launch import ending\n"
        "ending._STUCK_S = 0.3\n"
        "real = signal.pidfd_send_signal\n"
        "def send(descriptor, number):\n"
        "    if number != signal.SIGKILL:\n"
        "        real(descriptor, number)\n"
        "signal.pidfd_send_signal = send"
    )
    models = {
        "a": stand_in(tmp_path, "a", "--ignores-sigterm", devices=0, stop_timeout_s=0.1),
        "b": stand_in(tmp_path, "b", devices=0),
        "c": stand_in(tmp_path, "c", devices=1),
    }
    models["a"]["stop_after"] = 0.2
    with Fleet(tmp_path, models, before=before) as fleet:
        pid = fleet.pid_of("a")
        wait_for(lambda: fleet.states()["a"] == "stuck")
        for name in ("a", "b"):
            answer = fleet.ask(name)
            assert answer.status_code == 503
            assert (
                f"process {pid} does not end, also by SIGKILL" in answer.json()["error"]["message"]
            )
        assert fleet.pid_of("c")
        assert fleet.metric('state{server="a",state="stuck"}') == 1
        fleet.end()
        assert [process.pid for process in fleet.started()] == [pid]
        assert [file.name[:2] for file in fleet.state.glob("*.json")] == ["a-"]
        models["a"]["env"] = {"A": "b"}  # so that the next proxy does not keep the process
        fleet.write(models)
        fleet.start()
        assert fleet.states()["a"] == "stuck"
        for name in ("a", "b"):
            assert fleet.ask(name).status_code == 503
        assert [process.pid for process in fleet.started()] == [pid]
        psutil.Process(pid).kill()  # the driver is back
        wait_for(lambda: fleet.states()["a"] == "stopped")
        assert fleet.pid_of("b")
        assert fleet.pid_of("a") != pid


def test_a_second_sigterm_waits_for_nothing(tmp_path):
    entry = stand_in(tmp_path, "a", "--ignores-sigterm", stop_timeout_s=3600)
    with Fleet(tmp_path, {"a": entry}) as fleet, ThreadPoolExecutor() as pool:
        fleet.pid_of("a")
        running = pool.submit(fleet.ask, "a", f"until {tmp_path / 'never'}")
        wait_for(lambda: fleet.status()["a"]["in_flight"] == 1)
        fleet.process.terminate()
        wait_for(lambda: not serves(fleet))
        assert fleet.process.poll() is None
        fleet.end()
        assert fleet.started() == []
        assert running.exception() is not None or running.result().status_code >= 500


def test_a_second_sigterm_starts_nobody(tmp_path):
    """The end of one server would make way for another one."""
    never = tmp_path / "never"
    models = {
        "a": stand_in(tmp_path, "a", devices=0),
        "b": stand_in(tmp_path, "b", devices=0),
        "c": stand_in(tmp_path, "c", devices=1),
    }
    with (
        Fleet(tmp_path, models, "--turn-s", "3600") as fleet,
        ThreadPoolExecutor() as pool,
    ):
        fleet.pid_of("c")
        fleet.pid_of("a")
        running = pool.submit(fleet.ask, "a", f"until {never}")
        wait_for(lambda: fleet.status()["a"]["in_flight"] == 1)
        waiting = pool.submit(fleet.ask, "b")
        wait_for(lambda: fleet.status()["b"]["queued"] == 1)
        fleet.process.terminate()
        wait_for(lambda: not serves(fleet))
        fleet.end()
        assert fleet.started() == []
        assert "b starts 0" not in fleet.events()
        for lost in (running, waiting):
            assert lost.exception() is not None or lost.result().status_code >= 500


def test_a_server_that_starts_while_the_proxy_ends(tmp_path):
    entry = stand_in(tmp_path, "a", "--waits-for", str(tmp_path / "never"))
    with Fleet(tmp_path, {"a": entry}, "--grace-s", "1") as fleet, ThreadPoolExecutor() as pool:
        pool.submit(fleet.ask, "a")
        wait_for(lambda: fleet.events() == ["a starts"])
        fleet.end()
        assert fleet.started() == []
