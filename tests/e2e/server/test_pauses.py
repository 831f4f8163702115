# SPDX-License-Identifier: Apache-2.0
"""Pauses over HTTP: they outlive a sleep, and a sleep that waits for requests can be called off."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest
from helpers.async_engine import rejects_while_paused
from helpers.patience import wait_for
from helpers.server import InBackground

from vllm_sleep_ascend.client.sleep_client import SleepClient

pytestmark = pytest.mark.usefixtures("left_awake")

LONG = 450


def is_paused(server) -> bool:
    return server.http.get("/is_paused").json()["is_paused"]


async def wake(server) -> None:
    """Wake as the command line does, which checks that the server is awake."""
    async with SleepClient(str(server.http.base_url)) as client:
        await client.wake()


def completion(server, tokens: int, text: str = "The future of AI is") -> InBackground:
    body = {"model": server.model, "prompt": text, "max_tokens": tokens, "temperature": 0}
    return InBackground(server, "/v1/completions", json={**body, "ignore_eos": True})


@pytest.fixture(scope="module")
def undisturbed(server) -> str:
    return completion(server, LONG).answer().json()["choices"][0]["text"]


@contextlib.contextmanager
def under_way(server, undisturbed) -> Iterator[InBackground]:
    """A long request, whose answer in the end equals that of an undisturbed one."""
    request = completion(server, LONG)
    wait_for(server.runs_requests, "the request runs")
    yield request
    choice = request.answer().json()["choices"][0]
    assert (choice["finish_reason"], choice["text"]) == ("length", undisturbed)


@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_a_pause_outlives_a_sleep(server, mode):
    text = server.complete()
    server.post(f"/pause?mode={mode}")
    server.post("/sleep?level=1")
    assert server.http.post("/resume").status_code == 500  # the memory sleeps
    asyncio.run(wake(server))
    assert is_paused(server)
    assert server.http.get("/sleep_status").json()["state"] == "paused"
    late = completion(server, 8)
    rejected = mode == "abort" and rejects_while_paused()
    if rejected:
        assert late.answer().status_code == 503
    server.post("/sleep?level=0&mode=keep")
    server.post("/wake_up")
    assert is_paused(server)
    assert late.is_done() == rejected
    server.post("/resume" if mode == "keep" else "/wake_up?tags=scheduling")
    assert not is_paused(server)
    assert rejected or late.answer().json()["choices"][0]["text"] == text
    assert server.complete() == text


@pytest.mark.parametrize("path", ["/resume", "/wake_up"])
def test_a_sleep_whose_client_has_gone_is_called_off(server, undisturbed, path):
    with under_way(server, undisturbed) as request:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(
                b"POST /sleep?level=1&mode=wait HTTP/1.1\r\n"
                b"Host: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"
            )
            wait_for(server.is_sleeping, "the engine waits for its request")
        server.post(path)
        assert not request.is_done()
        assert not server.is_sleeping()
        assert server.http.get("/sleep_status").json()["state"] == "awake"


def test_the_client_of_a_sleep_that_is_called_off_is_told(server, undisturbed):
    with under_way(server, undisturbed) as request:
        sleep = InBackground(server, "/sleep?level=1&mode=wait")
        wait_for(server.is_sleeping, "the engine waits for its request")
        assert server.post("/wake_up?tags=weights")["status"] == "awake"
        error = sleep.answer().json()["error"]
        assert not request.is_done()
        assert (error["code"], error["type"]) == (503, "SleepModeError")
        assert "wake_up() called the sleep off while it waited for requests" in error["message"]
