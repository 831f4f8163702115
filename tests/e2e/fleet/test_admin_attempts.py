# SPDX-License-Identifier: Apache-2.0
"""Attempts at the proxy's admin port, which has no key here; others are in
tests/package/test_admin_port.py. About 5 seconds."""

import contextlib
import socket
from collections.abc import Iterator

import psutil
import pytest
from helpers import MIB, another_user
from helpers.fleet import Fleet, stand_in
from helpers.patience import patience, wait_for

GIB = 1 << 30


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with Fleet(folder, {"a": stand_in(folder, "a")}) as fleet:
        fleet.pid_of("a")
        yield fleet


@pytest.fixture(autouse=True)
def nothing_was_done(fleet):
    yield
    assert fleet.states() == {"a": "awake"}
    assert fleet.events() == ["a starts"]


def request(path: str, *headers: str, method: str = "POST") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "Connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


def connect(fleet: Fleet) -> socket.socket:
    return socket.create_connection(("127.0.0.1", fleet.admin_port), timeout=60 * patience())


@another_user.needs_root
@pytest.mark.parametrize(("method", "path"), [("POST", "/stop?model=a"), ("GET", "/log?model=a")])
def test_another_user_can_neither_stop_a_server_nor_read_its_log(fleet, method, path):
    answer = another_user.ask(fleet.admin_port, request(path, method=method))
    assert answer.startswith("HTTP/1.1 403")
    assert "only the proxy's own user and root may do this" in answer
    assert another_user.ask(fleet.admin_port, request("/health", method="GET")).startswith(
        "HTTP/1.1 200"
    )


def test_a_body_of_a_gibibyte_is_not_kept(fleet):
    process = psutil.Process(fleet.process.pid)
    before = process.memory_info().rss
    part = b"%x\r\n%b\r\n" % (MIB, b" " * MIB)
    with connect(fleet) as client:
        client.sendall(request("/sleep?model=nobody", "Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(GIB // MIB):
                client.sendall(part)
        assert process.memory_info().rss - before < 64 * MIB


def test_slow_clients_hold_up_nobody(fleet):
    process = psutil.Process(fleet.process.pid)
    before = process.num_fds()
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connect(fleet)) for _ in range(300)]
        for client in opened[100:200]:
            client.sendall(b"POST /sleep?model=a HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
        for client in opened[200:]:
            client.sendall(request("/sleep?model=nobody", "Content-Length: 9") + b"{")
        assert fleet.ask("a").status_code == 200
        assert fleet.admin.get("/status").status_code == 200
    wait_for(lambda: process.num_fds() < before + 20, "they are closed")


@pytest.mark.parametrize(
    "path", ["//sleep?model=a", "/sleep/?model=a", "/./sleep?model=a", "/SLEEP?model=a"]
)
def test_a_path_is_taken_as_it_is_written(fleet, path):
    with connect(fleet) as client:
        client.sendall(request(path, "Content-Length: 0"))
        assert client.recv(65536).split()[1] in (b"307", b"404")
