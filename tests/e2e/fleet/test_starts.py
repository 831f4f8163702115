# SPDX-License-Identifier: Apache-2.0
"""A proxy starts servers by models.yaml, and ends them. The servers are stand-ins for vLLM."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.fleet import Fleet, stand_in
from helpers.patience import wait_for


def test_the_first_request_starts_a_server(tmp_path):
    models = {"a": stand_in(tmp_path, "a"), "b": stand_in(tmp_path, "b")}
    with Fleet(tmp_path, models) as fleet:
        assert fleet.states() == {"a": "stopped", "b": "stopped"}
        assert fleet.started() == []
        names = [model["id"] for model in fleet.users.get("/v1/models").json()["data"]]
        assert names == ["a", "b"]
        pid = fleet.pid_of("a")
        assert [process.pid for process in fleet.started()] == [pid]
        assert fleet.states() == {"a": "awake", "b": "stopped"}
        other = fleet.pid_of("b")
        assert fleet.pid_of("a") == pid and fleet.pid_of("b") == other
        assert fleet.events() == [
            *("a starts", "a sleeps", "b starts"),
            *("b sleeps", "a wakes", "a sleeps", "b wakes"),
        ]
        assert fleet.metric("starts_total") == 2
        fleet.end()
        assert fleet.started() == []
        assert sorted(fleet.events()[-2:]) == ["a ends", "b ends"]


def test_many_first_requests_start_one_server(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet, ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(fleet.pid_of, ["a"] * 8))) == 1
        assert fleet.events() == ["a starts"]
        wait_for(lambda: fleet.status()["a"]["in_flight"] == 0)


def test_a_server_that_starts_slowly(tmp_path):
    """Requests for it wait, and those for other devices do not."""
    door = tmp_path / "door"
    models = {
        "slow": stand_in(tmp_path, "slow", "--waits-for", str(door), devices=0),
        "same": stand_in(tmp_path, "same", devices=0),
        "other": stand_in(tmp_path, "other", devices=1),
    }
    with Fleet(tmp_path, models) as fleet, ThreadPoolExecutor() as pool:
        slow = pool.submit(fleet.pid_of, "slow")
        wait_for(lambda: fleet.states()["slow"] == "starting")
        assert fleet.metric('state{server="slow",state="starting"}') == 1
        same = pool.submit(fleet.pid_of, "same")
        assert fleet.pid_of("other") == fleet.status()["other"]["pid"]
        assert not slow.done() and fleet.states()["same"] == "stopped"
        door.touch()
        assert slow.result() == fleet.status()["slow"]["pid"]
        assert same.result() == fleet.status()["same"]["pid"]
        assert fleet.states() == {"slow": "asleep", "same": "awake", "other": "awake"}


def test_what_does_not_come_up(tmp_path):
    entry = stand_in(tmp_path, "a", "--exits", "3", env={"THE_PASSWORD": "password-of-this"})
    with Fleet(tmp_path, {"a": entry, "b": stand_in(tmp_path, "b")}) as fleet:
        answer = fleet.ask("a")
        assert answer.status_code == 503
        brief = answer.json()["error"]["message"]
        assert brief.endswith("a has ended with exit code 3; the admin port's /status says more")
        said = fleet.status()["a"]["error"]
        assert "a has ended with exit code 3" in said
        assert " ".join(entry["command"]) in said
        assert "wrote last: it has no model, ***" in said
        (log,) = fleet.state.glob("a-*.log")
        assert str(log) in said
        assert log.read_text().split("\n")[1] == "it has no model, password-of-this"
        assert "password-of-this" not in fleet.log.read_text()
        shown = fleet.admin.get("/log", params={"model": "a"}).text
        assert shown.split("\n")[:2] == ["first line", "it has no model, ***"]
        assert said in fleet.log.read_text()
        assert fleet.pid_of("b") and fleet.started()[0].pid == fleet.pid_of("b")
        assert fleet.metric("failures_total") == 1


def test_a_program_that_is_not_there(tmp_path):
    with Fleet(tmp_path, {"a": {"command": "no-such-program ${PORT}"}}) as fleet:
        assert "has ended with exit code 127" in fleet.ask("a").json()["error"]["message"]
        said = fleet.status()["a"]["error"]
        assert "cannot run no-such-program: No such file or directory" in said


def test_a_server_that_does_not_serve_in_time(tmp_path):
    entry = stand_in(tmp_path, "a", "--waits-for", str(tmp_path / "none"), start_timeout_s=0.5)
    with Fleet(tmp_path, {"a": entry}) as fleet:
        answer = fleet.ask("a")
        assert answer.status_code == 503
        assert "did not serve within 0.5 s, and was ended" in answer.json()["error"]["message"]
        assert fleet.started() == []


def test_the_pause_after_starts_that_fail(tmp_path):
    """Requests fail at once then, and a later one starts it."""
    there = tmp_path / "there"
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a", "--serves-while", str(there))}) as fleet:
        for starts in (1, 2, 3):
            wait_for(lambda n=starts: fleet.ask("a") and fleet.status()["a"]["starts"] == n)
        answer = fleet.ask("a")  # the pause is 4 s by now
        assert answer.status_code == 503
        assert "not today" in fleet.status()["a"]["error"]
        assert "it starts again in" in answer.json()["error"]["message"]
        assert int(answer.headers["Retry-After"]) >= 4
        assert fleet.events() == ["a starts"] * 3
        there.touch()
        wait_for(lambda: fleet.ask("a").status_code == 200)
        assert fleet.events() == ["a starts"] * 4
        assert fleet.status()["a"]["error"] == ""


def test_servers_that_start_ahead(tmp_path):
    """Also one that fails at first, which then waits until nobody is awake. All of them share the
    device."""
    there = tmp_path / "there"
    models = {
        "a": stand_in(tmp_path, "a", preload=True),
        "b": stand_in(tmp_path, "b", "--serves-while", str(there), preload=True),
        "c": stand_in(tmp_path, "c", preload=True),
        "d": stand_in(tmp_path, "d"),
    }
    with Fleet(tmp_path, models) as fleet:
        wait_for(lambda: {"a starts", "c starts"} <= set(fleet.events()))
        wait_for(lambda: {*map(fleet.states().get, "ac")} == {"awake", "asleep"})
        assert fleet.events().count("b starts") == 1
        there.touch()
        awake = next(name for name, state in fleet.states().items() if state == "awake")
        assert fleet.admin.post("/sleep", params={"model": awake}).status_code == 200
        wait_for(lambda: fleet.states()["b"] == "awake")
        assert fleet.states() == {"a": "asleep", "b": "awake", "c": "asleep", "d": "stopped"}
        assert len(fleet.started()) == 3


def test_a_start_ahead_that_has_failed_puts_nobody_to_sleep(tmp_path):
    bad = stand_in(tmp_path, "bad", "--exits", "1")
    with Fleet(tmp_path, {"bad": bad, "good": stand_in(tmp_path, "good")}) as fleet:
        pid = fleet.pid_of("good")
        fleet.write({"bad": bad | {"preload": True}, "good": stand_in(tmp_path, "good")})
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "bad starts" in fleet.events())
        wait_for(lambda: fleet.states()["bad"] == "stopped")
        fleet.pid_of("good")
        # Its pause is over once a request starts it again.
        wait_for(lambda: fleet.ask("bad") and fleet.status()["bad"]["starts"] == 2)
        asked = fleet.events().count("good sleeps")
        assert 1 <= asked <= 2  # the first start ahead, and the request if it comes in its pause
        assert fleet.pid_of("good") == pid


def test_a_server_without_sleep_endpoints_does_not_count_as_started(tmp_path):
    wrong = stand_in(tmp_path, "wrong", "--without-sleep")
    with Fleet(tmp_path, {"wrong": wrong, "good": stand_in(tmp_path, "good")}) as fleet:
        answer = fleet.ask("wrong")
        assert answer.status_code == 503
        assert (
            "there is no /is_sleeping; start the server with" in answer.json()["error"]["message"]
        )
        assert fleet.states()["wrong"] == "stopped" and fleet.started() == []
        assert "it starts again in" in fleet.ask("wrong").json()["error"]["message"]
        assert fleet.pid_of("good")


def test_a_server_that_cannot_sleep_ends_in_place_of_it(tmp_path):
    wrong = stand_in(tmp_path, "wrong", "--fails-sleep-until", str(tmp_path / "never"))
    with Fleet(tmp_path, {"wrong": wrong, "good": stand_in(tmp_path, "good")}) as fleet:
        fleet.pid_of("wrong")
        assert fleet.pid_of("good")
        assert fleet.states() == {"wrong": "stopped", "good": "awake"}
        assert fleet.events() == [
            *("wrong starts", "wrong does not sleep", "wrong ends", "good starts")
        ]
        assert "wrong does not fall asleep, so it is ended" in fleet.log.read_text()


def test_any_error_of_a_start_has_a_pause(tmp_path):
    """And leaves no process: here the record cannot be written."""
    before = (
        "from vllm_sleep_ascend.proxy.launch.state import State\n"
        "def write(*_): raise RuntimeError('no record today')\n"
        "State.write = write"
    )
    models = {"a": stand_in(tmp_path, "a", preload=True)}
    with Fleet(tmp_path, models, before=before) as fleet:
        answer = fleet.ask("a")
        wait_for(lambda: "no record today" in fleet.status()["a"]["error"])
        answer = fleet.ask("a")
        assert answer.status_code == 503
        assert "a could not be started" in answer.json()["error"]["message"]
        assert fleet.started() == [] and fleet.events() == []
        assert fleet.log.read_text().count("no record today") < 10


@pytest.mark.parametrize("fails", ["serves", "look"])
def test_a_process_that_may_open_no_more_files(tmp_path, fails):
    """The start is tried on; what is left of a dead server is looked for again."""
    before = (
        "import os\n"
        "from pathlib import Path\n"
        "from vllm_sleep_ascend.client.calls import Calls\n"
        "from vllm_sleep_ascend.proxy.launch import group\n"
        "def failing(real):\n"
        "    def call(*args):\n"
        f"        if not Path({str(tmp_path / 'free')!r}).exists():\n"
        "            raise OSError(24, 'Too many open files')\n"
        "        return real(*args)\n"
        "    return call\n"
    )
    what = "Calls.serves" if fails == "serves" else "group.Group._members"
    before += f"{what} = failing({what})"
    models = {"a": stand_in(tmp_path, "a")}
    with Fleet(tmp_path, models, before=before) as fleet, ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(fleet.pid_of, "a")
            wait_for(lambda: fleet.events() == ["a starts"])
            if fails == "look":
                os.kill(first.result(), signal.SIGKILL)
                wait_for(lambda: fleet.states() == {"a": "stopping"})
            second = pool.submit(fleet.pid_of, "a")
            wait_for(lambda: fleet.status()["a"]["queued"] == 1 + (fails == "serves"))
        finally:
            (tmp_path / "free").touch()
        assert (second.result() == first.result()) == (fails == "serves")
        assert fleet.status()["a"]["starts"] == 1 + (fails == "look")


def test_devices_decide_who_takes_turns(tmp_path):
    models = {
        "zero": stand_in(tmp_path, "zero", devices=0),
        "one": stand_in(tmp_path, "one", devices=1),
        "both": stand_in(tmp_path, "both", devices=[0, 1]),
        "any": stand_in(tmp_path, "any"),
    }
    with Fleet(tmp_path, models) as fleet:
        for name in ("zero", "one"):
            fleet.pid_of(name)
        assert fleet.states()["zero"] == fleet.states()["one"] == "awake"
        fleet.pid_of("both")
        fleet.pid_of("any")
        assert list(fleet.states().values()) == ["asleep", "asleep", "asleep", "awake"]
        fleet.pid_of("one")
        fleet.pid_of("zero")
        assert list(fleet.states().values()) == ["awake", "awake", "asleep", "asleep"]
        starts = [event for event in fleet.events() if "starts" in event]
        assert starts == ["zero starts 0", "one starts 1", "both starts 0,1", "any starts"]


def test_an_alias_names_its_model(tmp_path):
    models = {
        "a": stand_in(tmp_path, "a", "--alias", "first", aliases=["first", "unknown"]),
        "b": stand_in(tmp_path, "b"),
    }
    with Fleet(tmp_path, models) as fleet:
        assert fleet.ask("first").json()["model"] == "a"
        names = [model["id"] for model in fleet.users.get("/v1/models").json()["data"]]
        assert names == ["a", "first", "unknown", "b"]
        said = "a has no model 'unknown'; start it with --served-model-name a first unknown"
        assert said in fleet.log.read_text()
        assert "'first'" not in fleet.log.read_text()


def test_what_needs_no_engine_starts_a_server_too(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        assert fleet.users.get("/v1/responses/x").status_code == 404
        assert fleet.states() == {"a": "stopped"}
        answer = fleet.users.post("/tokenize", json={"model": "a", "prompt": "x"})
        assert answer.status_code == 404  # the stand-in's
        assert fleet.states() == {"a": "awake"}


def test_the_operator_starts_a_server_and_puts_it_to_sleep(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}) as fleet:
        slept = fleet.admin.post("/sleep", params={"model": "a"})
        assert slept.json()["state"] == "stopped"
        assert fleet.admin.post("/wake", params={"model": "a"}).json()["state"] == "awake"
        assert fleet.admin.post("/sleep", params={"model": "a"}).json()["state"] == "asleep"
        assert fleet.events() == ["a starts", "a sleeps"]


STRANGER = """
import os, socket, sys
os.setuid(65534)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listens", flush=True)
while True:
    connection, _ = listener.accept()
    print(connection.recv(65536).decode(), flush=True)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")
    connection.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_stranger_on_the_port_gets_no_key(tmp_path):
    entry = stand_in(tmp_path, "a", "--waits-for", str(tmp_path / "never"))
    said = tmp_path / "said"
    with (
        Fleet(tmp_path, {"a": entry}, VLLM_API_KEY="the-key-of-users") as fleet,
        ThreadPoolExecutor() as pool,
    ):
        waiting = pool.submit(fleet.ask, "a")
        wait_for(lambda: fleet.events() == ["a starts"])
        port = fleet.status()["a"]["url"].rpartition(":")[2]
        with open(said, "wb") as out:
            stranger = subprocess.Popen([sys.executable, "-c", STRANGER, port], stdout=out)
        try:
            answer = waiting.result()
            assert answer.status_code == 503
            assert f"port {port} is used by user 65534" in answer.json()["error"]["message"]
            assert fleet.started() == [] or [p.pid for p in fleet.started()] == [stranger.pid]
            wait_for(lambda: "listens" in said.read_text())
            assert "the-key-of-users" not in said.read_text()
        finally:
            stranger.kill()
            stranger.wait()


def test_a_start_is_watched_without_the_key(tmp_path):
    with Fleet(tmp_path, {"a": stand_in(tmp_path, "a")}, VLLM_API_KEY="the-key") as fleet:
        fleet.pid_of("a")
        assert fleet.events() == ["a starts"]


def test_keys_are_in_no_log_and_no_list_of_processes(tmp_path):
    key, token = "key-of-the-doors-of-all", "token-of-the-hub"
    entry = stand_in(tmp_path, "a", env={"HF_TOKEN": token})
    with Fleet(tmp_path, {"a": entry}, SLEEP_ADMIN_KEY=key) as fleet:
        fleet.pid_of("a")
        (server,) = fleet.started()
        assert server.environ()["SLEEP_ADMIN_KEY"] == key and server.environ()["HF_TOKEN"] == token
        shown = [" ".join(server.cmdline()), " ".join(fleet.process.args), str(fleet.status())]
        shown += [file.read_text() for file in fleet.state.iterdir()] + [fleet.log.read_text()]
        assert not [text for text in shown if key in text or token in text]
