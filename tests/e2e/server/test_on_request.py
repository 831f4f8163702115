# SPDX-License-Identifier: Apache-2.0
"""A server that sleeps when it is idle, and that a request wakes."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import MIB
from helpers.faults import DRIVER_ERROR, OUT_OF_MEMORY, set_faults
from helpers.patience import wait_for
from helpers.server import HBM_GIB, MEMORY, SMALL, InBackground, Server

IDLE_S = 0.5
PROMPT = "The future of AI is"
SLOW_COPIES = "aclrtMemcpyAsync:1:delay_ms=20:*"
HELD_COPIES = "aclrtMemcpyAsync:1:delay_ms=60000:*"  # until the rules change

Start = Callable[..., Server]


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start a server, with a file of faults of its own: ``server.faults``."""
    folder = tmp_path_factory.mktemp("servers")

    def start(name: str, *arguments: str, **options: object) -> Server:
        faults = folder / f"{name}.faults"
        faults.touch()
        env = {
            "VLLM_SERVER_DEV_MODE": "1",
            "NPU_SIM_MACHINE": f"{name}-{os.getpid()}",
            "NPU_SIM_HBM_GIB": str(HBM_GIB),
            "NPU_SIM_FAULTS_FILE": str(faults),
        }
        sleep_mode = json.dumps({"sleep_mode": {"chunk_mib": 2, **options}})
        given = ("--enable-sleep-mode", "--dtype", "float32", "--additional-config", sleep_mode)
        log = folder / f"{name}.log"
        server = Server(tiny_model, *given, *arguments, *SMALL, *MEMORY, log=log, env=env)
        server.faults = faults
        return server

    return start


@pytest.fixture(scope="module")
def idle(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that sleeps by itself, and that a request wakes."""
    options = {"wake_on_request": True, "backup_dir": str(tmp_path_factory.mktemp("backups"))}
    with start("idle", idle_sleep_s=IDLE_S, **options) as server:
        yield server


@pytest.fixture(scope="module")
def server(start: Start) -> Iterator[Server]:
    """A server that a request wakes, and that does not sleep by itself."""
    with start("woken", wake_on_request=True) as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("idle", "server"):
        if name in request.fixturenames:
            set_faults(request.getfixturevalue(name).faults, "")


def body(server: Server, prompt: str = PROMPT, tokens: int = 12) -> dict[str, Any]:
    settings = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"model": server.model, "prompt": prompt, "return_token_ids": True, **settings}


def ids(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "length"
    return choice["token_ids"]


def tokens(server: Server, *args: Any) -> list[int]:
    return ids(server.http.post("/v1/completions", json=body(server, *args)))


def tokens_once_it_wakes(server: Server) -> list[int]:
    """As a client that comes again after the time that it was told."""
    answers: list[httpx.Response] = []

    def answered() -> bool:
        answers.append(server.http.post("/v1/completions", json=body(server)))
        return answers[-1].status_code == 200

    wait_for(answered, "it wakes")
    return ids(answers[-1])


def later(server: Server, *args: Any) -> InBackground:
    return InBackground(server, "/v1/completions", json=body(server, *args))


def state(server: Server) -> str:
    return server.http.get("/sleep_status").json()["state"]


def falls_asleep(server: Server) -> None:
    wait_for(lambda: state(server) == "asleep", "the idle server sleeps")


def wakes(server: Server) -> int:
    """How often a request woke it, or tried to."""
    return server.log.read_text().count("A request wakes the engine.")


def wait_for_wake(server: Server, before: int) -> None:
    wait_for(lambda: wakes(server) > before, "a request wakes it")


def idle_sleeps(server: Server) -> int:
    return server.log.read_text().count("the engine goes to sleep at level")


def runs(server: Server) -> bool:
    """Whether a request is computed."""
    lines = server.http.get("/metrics").text.splitlines()
    running = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    return any(float(line.split()[-1]) for line in running)


def sleep_is_under_way(server: Server) -> bool:
    metric = 'vllm:sleep_mode_operations_in_flight{operation="sleep"'
    lines = server.http.get("/metrics").text.splitlines()
    return any(float(line.split()[-1]) for line in lines if line.startswith(metric))


def held(server: Server) -> int:
    status = server.rank_status()
    return status["total"] - status["free"]


def test_it_sleeps_when_it_is_idle_and_a_request_wakes_it(idle):
    for _ in range(3):
        expected = tokens(idle)
        falls_asleep(idle)
        assert held(idle) < 64 * MIB
        assert idle.rank_status()["tags"]["weights"]["offloaded"] > 0
        before = wakes(idle)
        assert tokens(idle) == expected
        assert wakes(idle) > before


def test_what_generates_nothing_neither_wakes_it_nor_keeps_it_awake(idle):
    tokens(idle)
    model = {"model": idle.model}
    chat = {**model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    asks = [
        *(("GET", path, None, 200) for path in ("/health", "/metrics", "/v1/models", "/version")),
        ("POST", "/tokenize", {**model, "prompt": "Hi"}, 200),
        ("POST", "/detokenize", {**model, "tokens": [1, 2]}, 200),
        ("POST", "/v1/messages/count_tokens", chat, 200),
        ("POST", "/v1/completion", body(idle), 404),
        ("POST", "/v1/models", body(idle), 405),
    ]

    def sleeps() -> bool:
        for method, path, asked, code in asks:
            answer = idle.http.request(method, path, json=asked)
            assert answer.status_code == code, (path, answer.text)
        return state(idle) == "asleep"

    wait_for(sleeps, "it sleeps although it is asked")
    before = wakes(idle)
    assert sleeps()
    assert wakes(idle) == before


def test_a_stream_counts_until_it_ends(idle):
    expected = tokens(idle, PROMPT, 100)
    set_faults(idle.faults, SLOW_COPIES)  # a stream of several times what it takes to be idle
    asked = {**body(idle, PROMPT, 100), "stream": True}
    found: list[int] = []
    slept: set[int] = set()
    with idle.http.stream("POST", "/v1/completions", json=asked) as answer:
        for line in answer.iter_lines():
            before = idle_sleeps(idle)
            if runs(idle):
                slept.add(before)
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    found += choice.get("token_ids") or []
    set_faults(idle.faults, "")
    assert found == expected
    assert len(slept) == 1
    falls_asleep(idle)


def test_eight_requests_at_once_cause_one_wake(server):
    prompts = [f"{PROMPT} {number}" for number in range(8)]
    expected = [tokens(server, prompt) for prompt in prompts]
    server.post("/sleep")
    before = wakes(server)
    requests = [later(server, prompt) for prompt in prompts]
    assert [ids(request.answer()) for request in requests] == expected
    assert wakes(server) == before + 1


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_request_while_it_falls_asleep_waits_and_then_wakes_it(server, mode):
    expected = tokens(server)
    before = wakes(server)
    set_faults(server.faults, HELD_COPIES)
    sleep = InBackground(server, f"/sleep?mode={mode}")
    wait_for(lambda: sleep_is_under_way(server), "it falls asleep")
    request = later(server)
    set_faults(server.faults, "")
    assert sleep.answer().status_code == 200
    assert ids(request.answer()) == expected
    assert wakes(server) == before + 1


def test_a_sleep_that_waits_for_requests_is_not_called_off(server):
    expected, short = tokens(server, PROMPT, 100), tokens(server)
    set_faults(server.faults, SLOW_COPIES)
    running = later(server, PROMPT, 100)
    wait_for(server.runs_requests, "the long request runs")
    before = wakes(server)
    sleep = InBackground(server, "/sleep?mode=wait")
    wait_for(lambda: sleep_is_under_way(server) or sleep.is_done(), "the sleep waits")
    request = later(server)
    set_faults(server.faults, "")
    assert ids(running.answer()) == expected
    assert sleep.answer().status_code == 200
    assert ids(request.answer()) == short
    assert wakes(server) == before + 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (f"aclrtMapMem:1:{DRIVER_ERROR}:*", "aclrtMapMem failed with 507899"),
        (f"aclrtMemcpyAsync:1:{DRIVER_ERROR}:*", "aclrtMemcpyAsync failed with 507899"),
        (f"aclrtMallocPhysical:1:{OUT_OF_MEMORY}:*", "bytes free on the device"),
    ],
)
def test_a_wake_that_fails_is_told_and_loses_nothing(server, fault, words):
    expected = tokens(server)
    server.post("/sleep")
    tags = server.rank_status()["tags"]
    set_faults(server.faults, fault)
    requests = [later(server) for _ in range(4)]
    requests.append(InBackground(server, "/v1/completions", json={**body(server), "stream": True}))
    for request in requests:
        answer = request.answer()
        assert answer.status_code == 503, answer.text
        assert answer.headers["Retry-After"] == "1"
        message = answer.json()["error"]["message"]
        assert message.startswith("the engine sleeps, and a request could not wake it: ")
        assert words in message
    assert state(server) == "asleep"
    assert server.rank_status()["tags"] == tags
    assert server.http.get("/health").status_code == 200
    set_faults(server.faults, "")
    assert tokens_once_it_wakes(server) == expected


def test_requests_that_come_while_it_wakes_get_its_failure(server):
    expected = tokens(server)
    server.post("/sleep")
    before = wakes(server)
    set_faults(server.faults, HELD_COPIES)
    requests = [later(server)]
    wait_for_wake(server, before)
    streamed = {**body(server), "stream": True}
    requests += [later(server), InBackground(server, "/v1/completions", json=streamed)]
    set_faults(server.faults, f"aclrtMemcpyAsync:1:{DRIVER_ERROR}:*")
    answers = [request.answer() for request in requests]
    assert [answer.status_code for answer in answers] == [503] * 3
    set_faults(server.faults, "")
    server.post("/wake_up")
    server.post("/sleep")
    assert tokens(server) == expected  # and not the error of the sleep before


def test_a_pause_of_the_users_is_not_ended(server):
    expected = tokens(server)
    server.post("/sleep")
    server.post("/pause?mode=keep")
    before = wakes(server)
    waiting = later(server)
    time.sleep(1)  # for the request to come
    assert (state(server), wakes(server), waiting.is_done()) == ("asleep", before, False)
    server.post("/wake_up")
    assert state(server) == "paused"
    assert not waiting.is_done()
    server.post("/resume")
    assert ids(waiting.answer()) == expected
    assert wakes(server) == before


def test_level_2_is_woken_only_where_the_wake_brings_the_weights_back(server):
    expected = tokens(server)
    server.post("/sleep?level=2")
    answer = server.http.post("/v1/completions", json=body(server))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "after_level2='refuse': wake it and load its weights" in answer.text
    assert state(server) == "asleep"
    server.post("/wake_up?tags=weights")
    answer = server.http.post("/v1/completions", json=body(server))
    assert answer.status_code == 503
    server.post("/collective_rpc", json={"method": "reload_weights"})
    assert tokens(server) == expected  # which wakes the KV cache


def test_idle_at_level_2(start):
    options = {"idle_level": 2, "after_level2": "reload", "wake_on_request": True}
    with start("idle-2", idle_sleep_s=IDLE_S, **options) as server:
        expected = tokens(server)
        falls_asleep(server)
        assert server.rank_status()["tags"]["weights"]["discarded"] > 0
        assert server.rank_status()["tags"]["weights"]["host"] == 0
        assert tokens(server) == expected

        # Weights that are in no checkpoint are kept.
        def marks() -> bool:  # unless it has fallen asleep meanwhile
            tokens(server)
            asked = {"method": "mark_weights_loaded"}
            return server.http.post("/collective_rpc", json=asked).status_code == 200

        wait_for(marks, "the weights to be marked")
        assert server.rank_status()["weights"]["source"] == "mark_weights_loaded"
        falls_asleep(server)
        assert server.rank_status()["tags"]["weights"]["offloaded"] > 0
        assert tokens(server) == expected
        assert "The idle engine sleeps at level 1: the weights" in server.log.read_text()


def test_without_wake_on_request_it_sleeps_on(idle, start):
    expected = tokens(idle)
    with start("idle-only", idle_sleep_s=IDLE_S) as server:
        for _ in range(2):
            falls_asleep(server)
            waiting = later(server)

            def wakes_and_serves(waiting: InBackground = waiting) -> bool:
                server.post("/wake_up")  # it may fall asleep again before the request has come
                return waiting.is_done()

            wait_for(wakes_and_serves, "the request that waits")
            assert ids(waiting.answer()) == expected
        assert wakes(server) == 0


def test_a_paused_engine_is_not_idle(idle):
    expected = tokens(idle)
    idle.post("/pause?mode=keep")
    idle.post("/wake_up")  # if it fell asleep before it was paused
    slept = idle_sleeps(idle)
    time.sleep(4 * IDLE_S)
    assert (idle_sleeps(idle), state(idle)) == (slept, "paused")
    idle.post("/resume")
    falls_asleep(idle)
    assert tokens(idle) == expected


def test_an_idle_engine_that_cannot_sleep_says_so_and_tries_again(idle):
    def told() -> list[str]:
        words = re.compile(r"did not fall asleep, and tries again in (\S+) s: .*aclrtUnmapMem")
        return words.findall(idle.log.read_text())

    before = len(told())
    set_faults(idle.faults, f"aclrtUnmapMem:1:{DRIVER_ERROR}:*")
    expected = tokens(idle)
    wait_for(lambda: len(told()) >= before + 2, "two sleeps that fail")
    assert [float(again) for again in told()[before:][:2]] == [2 * IDLE_S, 4 * IDLE_S]
    assert state(idle) == "awake"
    set_faults(idle.faults, "")
    falls_asleep(idle)
    assert tokens(idle) == expected


def test_a_pause_of_an_idle_engine_ends_with_its_resume(idle):
    expected = tokens(idle)
    falls_asleep(idle)
    idle.post("/pause?mode=keep")
    idle.post("/resume")  # of a user who put nothing to sleep
    assert tokens(idle) == expected


def test_a_call_of_the_users_ends_a_sleep_that_is_not_theirs(idle, server):
    expected = tokens(idle)
    falls_asleep(idle)
    idle.post("/collective_rpc", json={"method": "compute_weight_checksums"})
    assert "A call wakes the engine." in idle.log.read_text()
    assert tokens(idle) == expected

    falls_asleep(idle)
    idle.post("/sleep?level=1&to=disk")  # where its backup lies does not make the sleep theirs
    assert idle.rank_status()["backups"]["host"] == 0 < idle.rank_status()["backups"]["disk"]
    before = idle.log.read_text().count("A call wakes the engine.")
    idle.post("/collective_rpc", json={"method": "compute_weight_checksums"})
    assert idle.log.read_text().count("A call wakes the engine.") == before + 1
    assert tokens(idle) == expected

    server.post("/sleep")
    asked = {"method": "compute_weight_checksums"}
    answer = server.http.post("/collective_rpc", json=asked)
    assert answer.status_code != 200
    assert state(server) == "asleep"
    assert tokens(server) == expected


def test_an_engine_that_dies_while_it_wakes_ends_the_request(start):
    with start("dies", "--api-key", "a-key", wake_on_request=True) as server:
        server.post("/sleep")

        # A request without the server's key does not wake it.
        assert server.http.post("/v1/completions", json=body(server)).status_code == 401
        assert (state(server), wakes(server)) == ("asleep", 0)

        server.http.headers["Authorization"] = "Bearer a-key"
        set_faults(server.faults, HELD_COPIES)
        request = later(server)
        wait_for_wake(server, 0)
        server.engine().kill()
        assert request.answer().status_code in (500, 503)


def test_a_server_that_ends_while_it_wakes_ends_the_request(start):
    with start("ends", wake_on_request=True) as server:
        server.post("/sleep")
        set_faults(server.faults, HELD_COPIES)
        request = later(server)
        wait_for_wake(server, 0)
        os.kill(server.process.pid, signal.SIGTERM)
        wait_for(lambda: server.process.poll() is not None, "the server ends", 60)
        assert request.answer().status_code in (500, 503)
