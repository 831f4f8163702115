# SPDX-License-Identifier: Apache-2.0
"""Servers that end by a ``stop_command``, as those in a container do. About 30 seconds.

A shell stands for ``docker run``: it ignores SIGTERM, and its server is not in its group.
"""

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
from helpers.fleet import Fleet, runs, stand_in
from helpers.patience import wait_for

RUN = 'trap "" TERM; file=$1; shift; setsid "$@" & echo $! > "$file"; wait'
STOP = 'kill -TERM "$(cat "$1")"'


def contained(folder: Path, name: str, stop: str = STOP, **more) -> dict:
    """An entry; the server's number is in a file that has that of its port for a name."""
    entry = stand_in(folder, name, **more)
    file = str(folder / "${PORT}")
    command = ["sh", "-c", RUN, "run", file, *entry["command"]]
    return {**entry, "command": command, "stop_command": ["sh", "-c", stop, "stop", file]}


@pytest.fixture(autouse=True)
def no_container_is_left(tmp_path):
    yield
    for file in tmp_path.iterdir():
        if file.name.isdigit() and file.read_text():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(int(file.read_text())).kill()


def test_it_ends_by_its_stop_command(tmp_path):
    with Fleet(tmp_path, {"a": contained(tmp_path, "a", stop_after=0.3)}) as fleet:
        server, shell = fleet.pid_of("a"), fleet.status()["a"]["pid"]
        assert server != shell
        wait_for(lambda: fleet.states()["a"] == "stopped")  # idle
        assert not runs(server) and not runs(shell)
        assert fleet.pid_of("a") != server
        fleet.end()
        assert fleet.started() == []
        assert fleet.events() == ["a starts", "a ends"] * 2
        assert "SIGKILL" not in fleet.log.read_text()


def test_what_its_command_leaves_behind_ends_by_it(tmp_path):
    with Fleet(tmp_path, {"a": contained(tmp_path, "a")}) as fleet:
        server = fleet.pid_of("a")
        os.kill(fleet.status()["a"]["pid"], signal.SIGKILL)
        wait_for(lambda: not runs(server))
        assert fleet.pid_of("a") != server
        assert fleet.events() == ["a starts", "a ends", "a starts"]


def test_that_of_an_earlier_proxy_is_run_as_it_was_written_down(tmp_path):
    with Fleet(tmp_path, {"a": contained(tmp_path, "a")}) as fleet:
        server = fleet.pid_of("a")
        fleet.process.kill()
        fleet.process.wait()
        fleet.write({"b": stand_in(tmp_path, "b")})
        fleet.start()
        wait_for(lambda: not runs(server))
        assert fleet.events() == ["a starts", "a ends"]
        assert not list(fleet.state.glob("a-*.json"))


def test_a_second_sigterm_to_the_proxy_shortens_it(tmp_path):
    stop = 'echo stops; kill -TERM "$(cat "$1")"; sleep 3600'
    with Fleet(tmp_path, {"a": contained(tmp_path, "a", stop, stop_timeout_s=3600)}) as fleet:
        fleet.pid_of("a")
        log = Path(fleet.status()["a"]["log"])
        fleet.process.terminate()
        wait_for(lambda: "stops" in log.read_text())
        fleet.end()
        assert "its stop_command did not end within" in fleet.log.read_text()


def test_what_a_start_that_fails_leaves_behind_gets_all_the_time(tmp_path):
    """The command of this one ends at once, and its stop_command takes longer than the least."""
    stop = 'sleep 6; kill -TERM "$(cat "$1")"; echo stopped'
    entry = contained(tmp_path, "a", stop)
    entry["command"][2] = 'file=$1; shift; setsid "$@" & echo $! > "$file"; exit 3'
    with Fleet(tmp_path, {"a": entry}) as fleet:
        assert fleet.ask("a").status_code == 503
        assert "stopped" in Path(fleet.status()["a"]["log"]).read_text()
        assert fleet.events() in ([], ["a starts", "a ends"])


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("echo no such container; exit 3", "its stop_command has ended with exit code 3"),
        ("sleep 600", "its stop_command did not end within"),
    ],
    ids=["fails", "hangs"],
)
def test_one_that_fails_is_said_and_signals_follow(tmp_path, stop, said):
    entry = contained(tmp_path, "a", stop, stop_timeout_s=0.2)
    with Fleet(tmp_path, {"a": entry}) as fleet:
        shell = (fleet.pid_of("a"), fleet.status()["a"]["pid"])[1]
        log = Path(fleet.status()["a"]["log"])
        fleet.end()
        assert not runs(shell)
        assert said in fleet.log.read_text() and "it gets SIGKILL" in fleet.log.read_text()
        assert ("no such container" in log.read_text()) == ("exit" in stop)
