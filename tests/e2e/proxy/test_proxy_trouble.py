# SPDX-License-Identifier: Apache-2.0
"""Servers that fail, die or wake on their own, and proxies that end. The last tests kill some."""

import http.server
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers import MIB, programs
from helpers.faults import set_faults
from helpers.patience import wait_for
from helpers.proxy import PROMPTS, Proxy, body, command, text, used
from helpers.server import free_ports

from .conftest import API_KEY

KEY = {"VLLM_API_KEY": API_KEY}


def weights(server) -> int:
    """Device bytes of the server's weights."""
    return server.rank_status()["tags"]["weights"]["device"]


def test_a_wake_that_fails_fails_its_requests_alone(pair, proxy):
    a, b = pair
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    set_faults(a.faults, "aclrtMallocPhysical:1:507899:1000000")
    failed = proxy.complete(b)
    assert failed.status_code == 503
    assert "aclrtMallocPhysical" in failed.json()["error"]["message"]
    set_faults(a.faults, "")
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
    assert proxy.metric("failures_total") == 1


def test_a_server_that_woke_unasked_sleeps_before_another_wakes(pair, proxy):
    """Like a restarted server: it is awake, and the proxy does not know."""
    a, b = pair
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
    proxy.admin.post("/sleep", params={"model": b.model})
    a.post("/wake_up")
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
    assert a.is_sleeping()
    assert used(b) <= b.alone + 100 * MIB


def test_a_server_that_was_put_to_sleep_by_hand_wakes_for_a_request(pair, proxy):
    _, b = pair
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
    b.post("/sleep")
    time.sleep(1.1)
    assert proxy.states()[1] == "awake"  # It does not know.
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]


def test_a_proxy_that_was_killed_leaves_a_wake_half_done(pair):
    a, b = pair
    with Proxy(pair) as proxy:
        assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
        proxy.process.kill()
    b.post("/wake_up", params={"tags": "weights"})
    assert b.is_sleeping() and weights(b) > 0
    with Proxy(pair) as proxy:
        wait_for(lambda: proxy.states() == ["awake", "asleep"])
        assert weights(b) == 0
        assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
        assert a.is_sleeping()


def test_an_ending_proxy_ends_what_runs(pair):
    a, _ = pair
    with Proxy(pair) as proxy, ThreadPoolExecutor() as pool:
        assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
        long = body(a, tokens=300, ignore_eos=True)
        running = pool.submit(proxy.users.post, "/v1/completions", json=long)
        wait_for(lambda: proxy.status()[0]["in_flight"] == 1)
        proxy.process.terminate()
        assert running.result().json()["usage"]["completion_tokens"] == 300
        proxy.process.wait(20)


def test_a_port_in_use_is_said(proxy):
    (free,) = free_ports(1)
    ports = ("--port", str(proxy.port), "--admin-port", str(free))
    line = command([], "http://127.0.0.1:9", *ports)
    done = programs.run(line, 60)
    assert done.returncode != 0
    assert "address already in use" in done.stderr


class Stranger(http.server.BaseHTTPRequestHandler):
    """Answers everything in JSON, but not like vLLM."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [7]}')

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


class Url:
    def __init__(self, port: int) -> None:
        self.port = port


def test_strangers_hold_nobody_up(pair):
    """One address is not served; another one has something other than vLLM."""
    a, b = pair
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        with Proxy([Url(9), Url(stranger.server_port), *pair]) as proxy:
            for server in (a, b, a):
                assert text(proxy.complete(server)) == server.texts[PROMPTS[0]]
            assert proxy.users.post("/v1/completions", json={"model": "x"}).status_code == 404
        stranger.shutdown()


def test_a_server_killed_while_it_falls_asleep(pair, third):
    """Its memory is free then, so requests for another model are served."""
    a, _ = pair
    with Proxy([a, third], env=KEY) as proxy, ThreadPoolExecutor() as pool:
        assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
        assert proxy.admin.post("/wake", params={"model": third.model}).status_code == 200
        os.killpg(third.process.pid, signal.SIGSTOP)  # The sleep begins, and does not end.
        waiting = pool.submit(proxy.complete, a)
        time.sleep(1)
        assert not waiting.done()
        third.kill()
        assert text(waiting.result()) == a.texts[PROMPTS[0]]
        sleeps = proxy.metric("sleeps_total")
        gone = proxy.complete(third)
        assert gone.status_code == 503
        assert "cannot connect" in gone.json()["error"]["message"]
        # No server was put to sleep for the missing one.
        assert not a.is_sleeping() and proxy.metric("sleeps_total") == sleeps


def test_an_engine_that_died_under_its_server(pair, proxy):
    a, b = pair
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
    b.engine().kill()
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    assert proxy.complete(b).status_code == 503
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]


def test_a_server_killed_while_it_answers_and_restarted(pair, proxy, start):
    """The client sees a truncated answer; the next one gets an error that the server is gone."""
    a, _ = pair
    long = body(a, tokens=450, stream=True, ignore_eos=True)
    with (
        pytest.raises(httpx.RemoteProtocolError),
        proxy.users.stream("POST", "/v1/completions", json=long) as answer,
    ):
        for number, _ in enumerate(answer.iter_lines()):
            if number == 4:
                a.kill()
    wait_for(proxy.quiet)
    assert proxy.states()[0] == "unknown"
    gone = proxy.complete(a)
    assert gone.status_code == 503
    assert "cannot connect" in gone.json()["error"]["message"]
    start("tiny-qwen2", a.model, port=a.port).post("/wake_up")
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    assert proxy.states()[0] == "awake"
