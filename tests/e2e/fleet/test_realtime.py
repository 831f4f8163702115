# SPDX-License-Identifier: Apache-2.0
"""Sessions of vLLM's websocket through the proxy. The servers have vLLM's own endpoint, and tell
how many samples of audio came. About 15 seconds."""

import base64
import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.fleet import Fleet
from helpers.patience import patience, wait_for
from helpers.server import free_ports
from helpers.warm import WarmProcess, kill_group

NAMES = ("a", "b")
PROGRAM = ROOT / "tests" / "helpers" / "realtime_server.py"


class Realtime:
    """Two servers, started by somebody else, behind a proxy."""

    def __init__(self, folder: Path, quiet_s: float) -> None:
        journal = str(folder / "journal")
        self.processes = {}
        models = {}
        for name, port in zip(NAMES, free_ports(len(NAMES)), strict=True):
            command = (PROGRAM, "--port", str(port), "--model", name, "--journal", journal)
            self.processes[name] = WarmProcess(command, folder / f"{name}.log")
            models[name] = {"url": f"http://127.0.0.1:{port}"}
        before = f"from vllm_sleep_ascend.proxy.http import realtime\nrealtime.QUIET_S = {quiet_s}"
        self.fleet = Fleet(folder, models, "--turn-s", "0", before=before)
        wait_for(self._is_up, "servers and proxy", 120)

    def _is_up(self) -> bool:
        return all(self.fleet.ask(name).status_code == 200 for name in NAMES)

    def connect(self, query: str, **headers: str):
        from websockets.sync.client import connect  # which few tests need

        url = f"ws://127.0.0.1:{self.fleet.port}/v1/realtime{query}"
        wait_s = 60 * patience()
        return connect(url, open_timeout=wait_s, proxy=None, additional_headers=headers)

    def refusal(self, query: str, **headers: str) -> tuple[int, str]:
        from websockets.exceptions import InvalidStatus

        with pytest.raises(InvalidStatus) as refused, self.connect(query, **headers):
            pass
        answer = refused.value.response
        return answer.status_code, json.loads(answer.body)["error"]["message"]

    def in_flight(self, name: str) -> int:
        return self.fleet.status()[name]["in_flight"]

    def close(self) -> None:
        self.fleet.__exit__()
        for process in self.processes.values():
            kill_group(process.pid)
            process.wait(60)


@pytest.fixture(scope="module")
def realtime(tmp_path_factory) -> Iterator[Realtime]:
    servers = Realtime(tmp_path_factory.mktemp("realtime"), quiet_s=3600)
    try:
        yield servers
    finally:
        servers.close()


def say(session, kind: str, **more) -> None:
    session.send(json.dumps({"type": kind, **more}))


def hear(session) -> dict:
    return json.loads(session.recv(60 * patience()))


def append(session, samples: int) -> None:
    audio = base64.b64encode(bytes(2 * samples)).decode()
    say(session, "input_audio_buffer.append", audio=audio)


def begin(session, model: str) -> None:
    assert hear(session)["type"] == "session.created"
    say(session, "session.update", model=model)
    say(session, "input_audio_buffer.commit")


def test_a_session_wakes_its_model_and_keeps_it_awake(realtime):
    fleet = realtime.fleet
    assert fleet.ask("a").status_code == 200
    with realtime.connect("?model=b") as session, ThreadPoolExecutor() as pool:
        assert fleet.states() == {"a": "asleep", "b": "awake"}
        begin(session, "b")
        waiting = pool.submit(fleet.ask, "a")
        wait_for(lambda: fleet.status()["a"]["queued"] == 1)
        for samples in (4, 7):
            append(session, samples)
            delta = hear(session)
            assert (delta["type"], delta["delta"]) == ("transcription.delta", f"{samples} ")
        assert realtime.in_flight("b") == 1 and not waiting.done()
        say(session, "input_audio_buffer.commit", final=True)
        assert hear(session)["text"] == "4 7 "
        assert fleet.events()[-1] == "b wakes"
        session.close()
        assert waiting.result().status_code == 200
    assert fleet.events()[-2:] == ["b sleeps", "a wakes"]
    assert fleet.metric('requests_total{server="b",status="101"}') == 1


def test_a_session_in_which_nothing_is_said_makes_way(tmp_path):
    from websockets.exceptions import ConnectionClosed

    servers = Realtime(tmp_path, quiet_s=0.5)
    try:
        with servers.connect("?model=b") as session, ThreadPoolExecutor() as pool:
            assert hear(session)["type"] == "session.created"
            waiting = pool.submit(servers.fleet.ask, "a")
            with pytest.raises(ConnectionClosed) as closed:
                hear(session)
            assert waiting.result().status_code == 200
    finally:
        servers.close()
    assert closed.value.rcvd.code == 1001
    assert closed.value.rcvd.reason == "nothing was said for 0.5 s"


def test_the_model_has_to_be_known_beforehand(realtime):
    before = realtime.fleet.events()
    assert realtime.refusal("") == (400, "name a model, one of a, b")
    assert realtime.refusal("?model=c") == (404, "no model 'c'; there are a, b")
    assert realtime.fleet.events() == before


def test_the_server_s_refusal_comes_through(realtime):
    refusal = realtime.refusal("?model=a", Authorization="Bearer wrong")
    assert refusal == (401, "Unauthorized")
    assert realtime.in_flight("a") == 0 and realtime.fleet.states()["a"] == "awake"


def test_a_client_that_leaves_while_it_waits(realtime):
    fleet = realtime.fleet
    lines = ("GET /v1/realtime?model=b HTTP/1.1", "Host: x", "Upgrade: websocket")
    key = ("Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}==")
    with realtime.connect("?model=a") as session:
        begin(session, "a")
        with socket.create_connection(("127.0.0.1", fleet.port)) as leaves:
            leaves.sendall("\r\n".join([*lines, *key, "", ""]).encode())
            wait_for(lambda: fleet.status()["b"]["queued"] == 1)
        wait_for(lambda: fleet.status()["b"]["queued"] == 0)
        append(session, 1)
        assert hear(session)["delta"] == "1 "
    wait_for(lambda: realtime.in_flight("a") == 0)
    assert fleet.ask("a").status_code == 200


def test_the_server_s_end_is_the_session_s(realtime):
    from websockets.exceptions import ConnectionClosed

    with realtime.connect("?model=b") as session:
        begin(session, "b")
        os.kill(realtime.processes["b"].pid, signal.SIGKILL)
        with pytest.raises(ConnectionClosed) as closed:
            hear(session)
    assert closed.value.rcvd.code == 1011
    assert closed.value.rcvd.reason == "the server broke it off"
    wait_for(lambda: realtime.in_flight("b") == 0)
    assert realtime.refusal("?model=b")[0] == 503
    assert realtime.fleet.ask("a").status_code == 200
