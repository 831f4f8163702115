# SPDX-License-Identifier: Apache-2.0
"""A proxy that is killed and started again finds its servers, which are stand-ins for vLLM."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import programs
from helpers.fleet import MODULE, Fleet, stand_in
from helpers.patience import wait_for
from helpers.warm import kill_group

from vllm_sleep_ascend.proxy.launch import state


def kill(fleet: Fleet) -> None:
    fleet.process.kill()
    fleet.process.wait()


def record_of(fleet: Fleet, name: str) -> Path:
    (record,) = fleet.state.glob(f"{name}-*.json")
    return record


def test_a_killed_proxy_finds_its_servers(tmp_path):
    models = {"a": stand_in(tmp_path, "a"), "b": stand_in(tmp_path, "b")}
    with Fleet(tmp_path, models) as fleet:
        pids = fleet.pid_of("a"), fleet.pid_of("b")
        kill(fleet)
        assert len(fleet.started()) == 2
        fleet.start()
        wait_for(lambda: fleet.states() == {"a": "asleep", "b": "awake"})
        assert (fleet.pid_of("a"), fleet.pid_of("b")) == pids
        starts = [event for event in fleet.events() if "starts" in event]
        assert starts == ["a starts", "b starts"]
        os.kill(pids[0], signal.SIGKILL)  # it is watched
        wait_for(lambda: fleet.states()["a"] == "stopped")
        assert fleet.pid_of("a") != pids[0]
        fleet.end()
        assert fleet.started() == []


def test_a_proxy_killed_while_a_server_starts(tmp_path):
    door = tmp_path / "door"
    with (
        Fleet(tmp_path, {"a": stand_in(tmp_path, "a", "--waits-for", str(door))}) as fleet,
        ThreadPoolExecutor() as pool,
    ):
        lost = pool.submit(fleet.ask, "a")
        wait_for(lambda: fleet.events() == ["a starts"])
        kill(fleet)
        assert lost.exception() is not None
        fleet.start()
        wait_for(lambda: fleet.states() == {"a": "starting"})
        found = pool.submit(fleet.pid_of, "a")
        wait_for(lambda: fleet.status()["a"]["queued"] == 1)
        door.touch()
        assert found.result() == fleet.started()[0].pid
        assert fleet.events() == ["a starts"]


def test_a_proxy_that_leaves_its_servers(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}, "--leave-servers") as fleet:
        pid = fleet.pid_of("a")
        fleet.end()
        fleet.start()
        assert fleet.pid_of("a") == pid
        assert fleet.events() == ["a starts"]


def test_a_server_whose_entry_has_changed_ends(tmp_path):
    models = {name: stand_in(tmp_path, name) for name in ("a", "b", "c")}
    with Fleet(tmp_path, models) as fleet:
        pids = {name: fleet.pid_of(name) for name in models}
        kill(fleet)
        models["b"] = stand_in(tmp_path, "b", env={"A": "b"})
        del models["c"]
        fleet.write(models)
        fleet.start()
        assert [process.pid for process in fleet.started()] == [pids["a"]]
        assert {"b ends", "c ends"} <= set(fleet.events())
        assert fleet.pid_of("a") == pids["a"]
        assert fleet.pid_of("b") != pids["b"]
        assert fleet.ask("c").status_code == 404


def test_a_server_that_died_meanwhile(tmp_path):
    """What it has left behind ends before another one starts."""
    with Fleet(
        tmp_path, {"a": stand_in(tmp_path, "a", "--with-child", stop_timeout_s=0.2)}
    ) as fleet:
        pid = fleet.pid_of("a")
        kill(fleet)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(fleet.started()) == 1)
        fleet.start()
        assert fleet.started() == []
        assert fleet.states() == {"a": "stopped"}
        assert fleet.pid_of("a") != pid


@pytest.mark.parametrize("change", [{"started": 1}, {"boot": "another"}])
def test_another_process_with_the_number_gets_no_signal(tmp_path, change):
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
            fleet.pid_of("a")
            kill(fleet)
            record = record_of(fleet, "a")
            content = json.loads(record.read_text())
            started = int(Path(f"/proc/{other.pid}/stat").read_text().split()[21])
            content |= {"pid": other.pid, "started": started}
            content |= {name: content[name] + value for name, value in change.items()}
            for identity in (content["identity"], "of before"):
                record.write_text(json.dumps(content | {"identity": identity}))
                fleet.start()
                assert fleet.states() == {"a": "stopped"}
                assert list(fleet.state.glob("*.json")) == []
                kill(fleet)
                assert other.poll() is None
            # Without the change the record is that of the process.
            content |= {"started": started, "boot": boot(), "identity": "of before"}
            record.write_text(json.dumps(content))
            fleet.start()
            assert other.wait(60) == -signal.SIGTERM
    finally:
        kill_group(other.pid)
        other.wait()


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_records_that_cannot_be_trusted(tmp_path):
    models = {name: stand_in(tmp_path, name) for name in ("link", "junk", "pid", "name", "owner")}
    with Fleet(tmp_path, models) as fleet:
        pids = {name: fleet.pid_of(name) for name in models}
        kill(fleet)
        elsewhere = tmp_path / "elsewhere"
        record_of(fleet, "link").rename(elsewhere)
        (fleet.state / "link-x.json").symlink_to(elsewhere)
        record_of(fleet, "junk").write_text("{")
        content = json.loads(record_of(fleet, "pid").read_text())
        record_of(fleet, "pid").write_text(json.dumps(content | {"pid": 1}))
        record_of(fleet, "name").rename(fleet.state / "other-0.json")
        if os.geteuid() == 0:
            os.chown(record_of(fleet, "owner"), 65534, 65534)
        else:
            record_of(fleet, "owner").write_text("[]")
        fleet.start()
        assert list(fleet.states().values()) == ["stopped"] * 5
        assert {process.pid for process in fleet.started()} == set(pids.values())
        assert fleet.log.read_text().count("is no record, and is left") == 5
        assert elsewhere.exists()


def test_a_log_that_is_a_link_is_not_written_to(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a", "--exits", "1")}) as fleet:
        fleet.ask("a")
        (log,) = fleet.state.glob("a-*.log")
        log.unlink()
        victim = tmp_path / "victim"
        victim.write_text("untouched")
        log.symlink_to(victim)
        wait_for(lambda: fleet.ask("a") and fleet.status()["a"]["starts"] == 2)
        assert victim.read_text() == "untouched"
        assert log.is_file() and not log.is_symlink()


def test_what_is_written_is_for_nobody_else(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        fleet.pid_of("a")
        assert fleet.state.stat().st_mode & 0o777 == 0o700
        files = list(fleet.state.iterdir())
        assert len(files) == 3  # lock, record, log
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def start_with(folder: Path, state: Path) -> str:
    """What a proxy says that cannot use the folder."""
    file = folder / "models.yaml"
    file.write_text("models: {a: {url: 'http://127.0.0.1:9'}}")
    command = [sys.executable, "-m", MODULE, "--config", str(file), "--state-dir", str(state)]
    done = programs.run(command, 60)
    assert done.returncode == 2
    return done.stderr


def test_a_folder_that_is_not_only_ours(tmp_path):
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(state)
    assert f"the folder {link} cannot be used: Not a directory" in start_with(tmp_path, link)
    state.chmod(0o770)
    assert "others can use the folder" in start_with(tmp_path, state)
    state.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(state, 65534, 65534)
        assert "belongs to user 65534" in start_with(tmp_path, state)
    assert list(state.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert "cannot be used" in start_with(tmp_path, file)


def test_two_proxies_with_one_folder(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        pid = fleet.pid_of("a")
        said = programs.run([*fleet.process.args], 60)
        assert said.returncode == 2
        assert f"another proxy uses the folder {fleet.state}" in said.stderr
        assert fleet.pid_of("a") == pid


def test_a_port_in_use_ends_what_was_found(tmp_path):
    """Nobody would watch it."""
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        fleet.pid_of("a")
        kill(fleet)
        with socket.create_server(("127.0.0.1", fleet.port)):
            done = programs.run(fleet.process.args, 60)
        assert done.returncode == 3
        assert "address already in use" in done.stderr
        assert "Traceback (most recent call last):" not in done.stderr
        assert fleet.started() == []


def test_the_folder_without_an_option(tmp_path, monkeypatch):
    """By the port, in the user's state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state.default(8000) == tmp_path / "vllm-sleep-proxy" / "8000"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for other in ("relative", ""):
        monkeypatch.setenv("XDG_STATE_HOME", other)
        assert state.default(1) == tmp_path / "home/.local/state/vllm-sleep-proxy/1"
    made = state.State(state.default(1))
    try:
        assert made.folder.stat().st_mode & 0o777 == 0o700
    finally:
        made.close()
