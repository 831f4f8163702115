# SPDX-License-Identifier: Apache-2.0
"""The admin door of a server without the development mode, and attempts to misuse it."""

import contextlib
import json
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
from helpers import MIB, another_user
from helpers.cli import vllm_sleep
from helpers.patience import patience, wait_for
from helpers.proxy import Proxy, text
from helpers.server import HBM_GIB, MEMORY, SMALL, Server, free_ports, http_client

from vllm_sleep_ascend import admin_key

KEY = "the-key-of-this-test-0123456789"
OPTIONS = ("--enable-sleep-mode", "--dtype", "float32", *SMALL, *MEMORY)
GIB = 1 << 30
ENDPOINTS = (
    *("/sleep", "/wake_up", "/is_sleeping", "/sleep_status", "/release_kv_cache_memory"),
    "/save_image",
)


class Door(NamedTuple):
    server: Server
    port: int
    http: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def state(self) -> str:
        return self.http.get("/sleep_status").json()["state"]

    def held(self) -> int:
        """Device bytes of all processes."""
        (rank,) = self.http.get("/sleep_status").json()["ranks"]
        return rank["total"] - rank["free"]

    def count(self, operation: str) -> float:
        name = f'vllm:sleep_mode_operation_duration_seconds_count{{operation="{operation}"}}'
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def raw(self, request: bytes) -> bytes:
        """What comes back on a connection, until the server closes it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60 * patience()) as client:
            client.sendall(request)
            return read(client)


def read(client: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            answer += part
    return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def request(path: str, *headers: str, method: str = "GET", key: str = KEY) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def environment(name: str, **more: str) -> dict[str, str]:
    machine = {"NPU_SIM_MACHINE": f"{name}-{os.getpid()}", "NPU_SIM_HBM_GIB": str(HBM_GIB)}
    return {**machine, "VLLM_SERVER_DEV_MODE": "0", **more}


def config(**options: object) -> tuple[str, str]:
    return "--additional-config", json.dumps({"sleep_mode": options})


@pytest.fixture(scope="module")
def door(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("door") / "log"
    env = environment("door", **{admin_key.VARIABLE: KEY})
    with Server(tiny_model, *OPTIONS, *config(admin_port=port), log=log, env=env) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        address = f"http://127.0.0.1:{port}"
        with http_client(address, headers=headers) as http:
            yield Door(server, port, http)


@pytest.fixture(autouse=True)
def nothing_was_done(request: pytest.FixtureRequest) -> Iterator[None]:
    """Attempts of a test put nothing to sleep, and the key stands in no line of the log."""
    yield
    if "door" in request.fixturenames:
        door: Door = request.getfixturevalue("door")
        assert door.state() == "awake"
        assert KEY not in door.server.log.read_text()


def test_it_sleeps_and_wakes_without_the_development_mode(door):
    before, awake = door.server.complete(), door.held()
    assert door.http.post("/sleep?level=1").json() == {"status": "sleeping", "level": 1}
    assert door.held() < 64 * MIB < awake
    assert door.http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert door.http.get("/health").status_code == 200
    assert door.http.post("/wake_up", json={"tags": ["weights"]}).json()["status"] == "sleeping"
    assert door.http.post("/wake_up").json()["status"] == "awake"
    assert door.http.get("/sleep_status").json()["models"] == [door.server.model]
    assert door.server.complete() == before
    answer = door.http.post("/sleep?level=7")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "ValueError")


def test_the_operators_tools_go_through_it(door, monkeypatch, tmp_path):
    before = door.server.complete()
    refused = vllm_sleep("sleep", door.url, code=1).stderr
    assert "401: the admin key is needed" in refused
    monkeypatch.setenv(admin_key.VARIABLE, KEY)
    status = json.loads(vllm_sleep("status", door.url, "--json").stdout)
    assert status["servers"][0]["models"] == [door.server.model]
    assert vllm_sleep("sleep", door.url, "--level", "2").stdout.startswith(f"{door.url} sleeps at")
    monkeypatch.delenv(admin_key.VARIABLE)
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    wake = ("wake", door.url, "--admin-key-file", str(file))
    assert "others can read" in vllm_sleep(*wake, code=2).stderr
    file.chmod(0o600)
    woken = json.loads(vllm_sleep(*wake, "--json").stdout)
    steps = ["wake weights", "reload_weights", "wake", "reset_prefix_cache"]
    assert [step["step"] for step in woken["steps"]] == steps
    assert door.server.complete() == before


def test_the_proxy_goes_through_it(door):
    before = door.server.complete(tokens=12)
    door.server.door = door.url
    with Proxy([door.server], env={admin_key.VARIABLE: KEY}) as proxy:
        assert proxy.admin.post("/sleep", params={"model": door.server.model}).status_code == 200
        assert door.state() == "asleep"
        assert text(proxy.complete(door.server)) == before
        assert proxy.metric("switches_total") == 1


def test_each_port_has_its_own_endpoints_alone(door):
    public = door.server.http
    for path in (*ENDPOINTS, "/reload_weights", "/reset_prefix_cache"):
        for method in ("GET", "POST"):
            assert public.request(method, path).status_code == 404, path
    others = ("/", "/docs", "/openapi.json", "/v1/models", "/v1/completions", "/version", "/ping")
    development = ("/collective_rpc", "/server_info", "/pause", "/resume", "/update_weights")
    for path in (*others, *development, "/start_profile", "/tokenize", "/invocations"):
        for method in ("GET", "POST"):
            assert door.http.request(method, path).status_code == 404, path
    for path in ("/sleep", "/wake_up", "/reload_weights", "/reset_prefix_cache"):
        assert door.http.get(path).status_code == 405, path
    assert door.http.put("/sleep").status_code == 405


def test_its_metrics_are_those_of_sleep(door):
    before = door.count("sleep"), door.count("wake")
    door.http.post("/sleep")
    text = door.http.get("/metrics").text
    assert 'state="offloaded"' in text
    names = {line.partition("{")[0] for line in text.splitlines() if line[0] != "#"}
    assert all(name.startswith(("vllm:sleep_mode_", "vllm:engine_sleep_state")) for name in names)
    assert {"vllm:sleep_mode_bytes", "vllm:sleep_mode_held_bytes"} < names
    door.http.post("/wake_up")
    assert (door.count("sleep"), door.count("wake")) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Authorization:",
        "Authorization: Bearer",
        "Authorization: Bearer wrong",
        f"Authorization: Bearer {KEY[:-1]}",
        f"Authorization: Bearer {KEY}0",
        f"Authorization: Bearer {KEY.upper()}",
        f"Authorization: Bearer {KEY}, Bearer {KEY}",
        f"Authorization: Basic {KEY}",
        f"Authorization: {KEY}",
        f"X-Authorization: Bearer {KEY}",
        f"Cookie: Authorization=Bearer {KEY}",
    ],
)
def test_without_the_key_nothing_is_answered(door, header):
    before = door.count("sleep")
    lines = (header,) if header else ()
    for path in (*ENDPOINTS, f"/sleep?key={KEY}", "/health", "/metrics", "/no_such_path"):
        answer = door.raw(request(path, *lines, method="POST", key=""))
        assert status(answer) == 401, (path, answer)
        assert KEY.encode() not in answer
        assert b"\r\nwww-authenticate: Bearer\r\n" in answer
    assert door.count("sleep") == before


@pytest.mark.parametrize(
    "headers",
    [
        ("Authorization: Bearer wrong",),
        (f"Authorization: Bearer {KEY}",),
        ("Content-Length: 0", "Content-Length: 5"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding : chunked",),
        ("Content-Length: +5",),
        ("Content-Length: 0x5",),
        ("Host: other",),
        ("Content-Type: application/json", "Content-Type: text/plain"),
        ("Nul: \0",),
    ],
    ids=lambda headers: headers[0][:30],
)
def test_headers_that_contradict_themselves_are_refused(door, headers):
    before = door.count("sleep")
    smuggled = b"0\r\n\r\n" + request("/sleep", "Content-Length: 0", method="POST")
    answer = door.raw(request("/sleep", *headers, method="POST") + smuggled)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert status(answer) in (400, 431, 501), answer
    assert door.count("sleep") == before


def test_a_connection_has_one_request(door):
    two = request("/health") + request("/sleep", "Content-Length: 0", method="POST")
    answer = door.raw(two)
    assert answer.count(b"HTTP/1.1 ") == 1 and status(answer) == 200
    assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize(
    "path",
    [
        "//sleep",
        "/sleep/",
        "/sleep/..",
        "/sleep/../wake_up",
        "/./sleep",
        "/health/../sleep",
        "/sl%65ep",
        "/%2fsleep",
        "/sleep%2f",
        "/sleep%00",
        "/sleep%0a",
        "/sleep;/",
        "/SLEEP",
        "/sleep\\",
        "*",
        "http://127.0.0.1/sleep",
    ],
)
def test_a_path_is_taken_as_it_is_written(door, path):
    before = door.count("sleep")
    answer = door.raw(request(path, "Content-Length: 0", method="POST"))
    assert status(answer) in (400, 404), answer
    assert door.count("sleep") == before


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json-patch+json"}, 415),
    ],
)
def test_a_web_page_can_do_nothing(door, headers, code):
    before = door.count("sleep")
    answer = door.http.post("/sleep", content=b'{"level": 1}', headers=headers)
    assert answer.status_code == code
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    assert door.http.options("/sleep", headers=preflight).status_code == code
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert door.count("sleep") == before


def memory(server: Server) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


def test_a_body_of_a_gibibyte_is_refused_before_it_is_read(door):
    before = memory(door.server)
    announced = request("/sleep", f"Content-Length: {GIB}", method="POST")
    answer = door.raw(announced)  # and no byte of it
    assert status(answer) == 413
    assert b"at most 65536 bytes" in answer

    part = b"%x\r\n%b\r\n" % (MIB, b" " * MIB)
    sent = 0
    with socket.create_connection(("127.0.0.1", door.port), timeout=60 * patience()) as client:
        client.sendall(request("/sleep", "Transfer-Encoding: chunked", method="POST"))
        with contextlib.suppress(ConnectionError):
            while sent < GIB:
                client.sendall(part)
                sent += MIB
    assert sent < 64 * MIB
    assert memory(door.server) - before < 64 * MIB


def test_without_the_key_a_body_is_not_waited_for(door):
    answer = door.raw(request("/sleep", f"Content-Length: {GIB}", method="POST", key=""))
    assert status(answer) == 401


def test_slow_clients_hold_up_nobody_and_are_sent_away(door):
    before = door.server.complete()
    connect = (("127.0.0.1", door.port), 60 * patience())
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(*connect)) for _ in range(64)]
        silent, slow_headers, slow_body = opened[:20], opened[20:40], opened[40:]
        for client in slow_headers:
            client.sendall(b"POST /sleep HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
        for client in slow_body:
            client.sendall(request("/sleep", "Content-Length: 9", method="POST") + b"{")
        assert door.http.get("/health").status_code == 200
        assert door.server.complete() == before
        for client in (*silent, *slow_headers):
            assert read(client) == b""
        for client in slow_body:
            assert status(read(client)) == 408


def test_connections_leave_the_server_its_file_descriptors(door):
    process = psutil.Process(door.server.process.pid)
    before = process.num_fds()
    connect = (("127.0.0.1", door.port), 60 * patience())
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(socket.create_connection(*connect))
        assert door.server.complete()
        assert process.num_fds() < before + 300
    wait_for(lambda: process.num_fds() < before + 20, "they are closed")


def test_the_key_is_in_no_list_of_processes_and_in_no_answer(door):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert KEY not in " ".join(process.cmdline())
    for path in ("/sleep_status", "/metrics", "/is_sleeping", "/no_such_path"):
        assert KEY not in door.http.get(path).text
    assert "The admin door is open at" in door.server.log.read_text()


def served(path: Path) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(base_url="http://door", transport=transport, timeout=120 * patience())


@pytest.fixture
def opened() -> Iterator[Path]:
    """A folder that all users may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.slow
def test_a_socket_is_its_users_alone_and_a_stale_one_is_no_obstacle(tiny_model, tmp_path, opened):
    path = opened / "admin"
    env = environment("socket")
    options = (*OPTIONS, *config(admin_socket=str(path)))
    path.write_text("a file of somebody")
    with pytest.raises(AssertionError, match="is there and is no socket; move it away"):
        Server(tiny_model, *options, log=tmp_path / "refused", env=env)
    assert path.read_text() == "a file of somebody"
    path.unlink()

    with Server(tiny_model, *options, log=tmp_path / "first", env=env) as server:
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, os.geteuid())
        if os.geteuid() == 0:
            refused = another_user.ask(path, request("/sleep", method="POST"))
            assert refused == "not permitted"
        before = server.complete()
        with served(path) as http:
            assert http.post("/sleep").json()["status"] == "sleeping"
            assert http.get("/sleep_status").json()["state"] == "asleep"
            assert http.post("/wake_up").json()["status"] == "awake"
        assert vllm_sleep("sleep", f"unix:{path}").stdout.startswith(f"unix:{path} sleeps at")
        vllm_sleep("wake", f"unix:{path}")
        assert server.complete() == before
        with pytest.raises(AssertionError, match="is in use by another server"):
            Server(tiny_model, *options, log=tmp_path / "second", env=environment("second"))
        assert path.stat().st_ino == found.st_ino
        server.kill()
    assert path.is_socket()  # left by kill -9

    with Server(tiny_model, *options, log=tmp_path / "third", env=env) as server:
        with served(path) as http:
            assert http.get("/sleep_status").json()["state"] == "awake"
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.wait(60 * patience())
        assert not path.exists()
    assert vllm_sleep("status", f"unix:{path}", code=3).stdout == ""


@pytest.mark.slow
def test_a_port_that_is_taken_ends_the_start(door, tiny_model, tmp_path):
    options = (*OPTIONS, *config(admin_port=door.port))
    with pytest.raises(AssertionError, match="choose another port, or end what listens there"):
        Server(tiny_model, *options, log=tmp_path / "log", env=environment("taken"))
    (port,) = free_ports(1)
    options = (*OPTIONS, *config(admin_port=port))
    with pytest.raises(AssertionError, match=f"admin_port={port} is also the server's --port"):
        Server(tiny_model, *options, log=tmp_path / "log 2", env=environment("twice"), port=port)


@pytest.mark.slow
def test_one_of_several_api_servers_has_it_and_loopback_needs_no_key(tiny_model, tmp_path):
    (port,) = free_ports(1)
    options = (*OPTIONS, "--api-server-count", "2", *config(admin_port=port))
    log = tmp_path / "log"
    env = environment("two-front-ends")
    # Cold: prometheus_client decides at its import whether several processes share their metrics.
    with Server(tiny_model, *options, log=log, env=env, cold=True) as server:
        door = Door(server, port, http_client(f"http://127.0.0.1:{port}"))
        wait_for(lambda: "The admin door is open at" in log.read_text(), "the door opens")
        before = server.complete()
        assert door.http.post("/sleep").json()["status"] == "sleeping"
        assert door.state() == "asleep"
        assert 'state="offloaded"' in door.http.get("/metrics").text
        assert door.http.post("/wake_up").json()["status"] == "awake"
        assert [server.complete() for _ in range(4)] == [before] * 4
        for host, code in (("localhost", 200), (f"127.0.0.1:{port}", 200), ("[::1]:1", 200)):
            assert door.http.get("/health", headers={"Host": host}).status_code == code
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::"):
            assert door.http.get("/health", headers={"Host": host}).status_code in (400, 403)
        assert log.read_text().count("The admin door is open at") == 1
        assert "The admin door has no key: every user of this machine" in log.read_text()
        door.http.close()
