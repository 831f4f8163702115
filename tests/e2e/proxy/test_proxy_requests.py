# SPDX-License-Identifier: Apache-2.0
"""Bad requests, and what the proxy's ports reveal."""

import json
import socket

import httpx
import pytest
from helpers import programs
from helpers.proxy import PROMPTS, Proxy, body, command, text

from .conftest import API_KEY

MANY = b"x" * (2 << 20)


@pytest.fixture(scope="module")
def strict(pair):
    """A proxy on all addresses that accepts bodies of up to 1 MiB."""
    with Proxy(pair, "--host", "0.0.0.0", "--max-body-mib", "1") as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/completions", b'{"model": "nobody", "prompt": "x"}', 404),
        ("/v1/completions", b'{"model": "\\ud800", "prompt": "x"}', 404),
        ("/v1/completions", json.dumps({"model": "x" * 100_000}).encode(), 404),
        ("/v1/completions", b'{"prompt": "x"}', 400),
        ("/v1/completions", b'{"model": 7}', 400),
        ("/v1/completions", b"not JSON", 400),
        ("/v1/completions", b"\xff\xfe", 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/completions", b"", 400),
        ("/v1/completions", MANY, 413),
        ("/v1/completions", [MANY], 413),  # In chunks, of unknown length.
        ("/v1/%2e%2e/sleep", b"{}", 400),
        ("/v1/../sleep", b"{}", 404),
    ],
)
def test_what_no_server_gets_to_see(pair, strict, path, content, status):
    before = [server.is_sleeping() for server in pair]
    answer = strict.users.post(path, content=content)
    assert answer.status_code == status
    assert len(answer.content) < 1000
    assert [server.is_sleeping() for server in pair] == before
    assert strict.quiet()


def test_a_server_s_own_refusals_come_through(pair, strict):
    answer = strict.users.post("/v1/completions", json=body(pair[0], temperature=-1))
    assert answer.status_code == 400
    assert "temperature" in answer.text


def test_a_large_body_comes_through(pair, strict):
    long = body(pair[0], "fox " * 200_000)
    answer = strict.users.post("/v1/completions", json=long, headers={"Expect": "100-continue"})
    assert answer.status_code == 400
    assert "maximum context length" in answer.text


@pytest.mark.parametrize("path", ["/status", "/metrics", "/sleep", "/wake", "/wake_up"])
def test_the_operator_s_calls_are_not_for_users(pair, strict, path):
    before = [server.is_sleeping() for server in pair]
    parameters = {"model": pair[0].model, "tags": "weights"}
    for method in ("GET", "POST"):
        for prefix in ("", "/v1/..", "/v1/%2e%2e", "/v1/%252e%252e"):
            answer = strict.users.request(method, prefix + path, params=parameters, json={})
            assert answer.status_code in (400, 404, 405), (method, prefix)
    assert [server.is_sleeping() for server in pair] == before


def test_the_admin_port_is_on_loopback_alone(strict):
    address = next(
        found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    )
    # All of 127/8 is this machine: 127.0.0.2 stands for an address that is not the admin port's.
    for other in {address, "127.0.0.2"}:
        assert httpx.get(f"http://{other}:{strict.port}/health").status_code == 200
        if other != "127.0.0.1":
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://{other}:{strict.admin_port}/status")


def test_a_server_that_wants_a_key(pair, third):
    """The proxy uses its own key, and users need theirs."""
    with Proxy([third], env={"VLLM_API_KEY": API_KEY}) as proxy:
        assert proxy.status()[0]["models"] == [third.model]
        assert proxy.complete(third).status_code == 401
        proxy.users.headers["Authorization"] = f"Bearer {API_KEY}"
        assert text(proxy.complete(third)) == third.texts[PROMPTS[0]]
        assert proxy.admin.post("/sleep").json()["state"] == "asleep"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("http://127.0.0.1:9", "http://127.0.0.1:9"), "is named more than once"),
        (("ftp://x",), "is not a server's address"),
        (("http://x", "--max-awake", "0"), "--max-awake must be at least 1"),
        (("http://x", "--idle-s", "nan"), "--idle-s must not be negative"),
    ],
)
def test_wrong_usage(options, reason):
    done = programs.run(command([], *options), 60)
    assert done.returncode == 2
    assert reason in done.stderr
