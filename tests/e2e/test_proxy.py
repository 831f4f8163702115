# SPDX-License-Identifier: Apache-2.0
"""The switching proxy before two real servers that take turns on one simulated NPU.

The device has room for both, so that the proxy alone keeps them from being awake together. The
closed loop runs for SWITCH_LOAD_S seconds (30); `make switch-load` runs it for five minutes.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time

import httpx
import pytest
from server import SMALL, Server
from support import MIB, make_model

OPTIONS = ("--enable-sleep-mode", *SMALL, "--gpu-memory-utilization", "0.4")
CHUNKS = ("--additional-config", '{"sleep_mode": {"chunk_mib": 2}}')
PROMPTS = ["The future of AI is", "One day a fox", "import os\n", "def main(", "Once more"]
TOKENS = 12
CLIENTS = 16
LOAD_S = float(os.environ.get("SWITCH_LOAD_S", "30"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two servers with different models; ``texts`` has what each says to each prompt alone."""
    logs = tmp_path_factory.mktemp("pair")
    faults = logs / "faults"
    faults.touch()
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"proxy-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
        "NPU_SIM_LINK_GBPS": "0.05",
        "NPU_SIM_FAULTS_FILE": str(faults),
    }
    with contextlib.ExitStack() as stack:
        servers = []
        for name in ("tiny-qwen2", "tiny-llama"):
            model = make_model(name)
            log = logs / name
            server = stack.enter_context(Server(model, *OPTIONS, *CHUNKS, log=log, env=env))
            server.texts = {prompt: server.complete(prompt, TOKENS) for prompt in PROMPTS}
            status = server.rank_status()
            server.alone = status["total"] - status["free"]
            server.faults = faults
            server.post("/sleep")
            servers.append(server)
        assert servers[0].texts != servers[1].texts
        yield servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Proxy:
    """A proxy process."""

    def __init__(self, urls: list[str], *options: str) -> None:
        port, admin = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.users = httpx.Client(base_url=self.url, timeout=120)
        self.admin = httpx.Client(base_url=f"http://127.0.0.1:{admin}", timeout=120)
        command = [sys.executable, "-m", "vllm_sleep_ascend.proxy", *urls]
        command += ["--port", str(port), "--admin-port", str(admin), *options]
        self.process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if any(server["models"] for server in self.status()):
                    return
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    def status(self) -> list[dict]:
        return self.admin.get("/status").json()["servers"]

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = self.admin.get("/metrics").text.splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith(f"sleep_proxy_{name}"))

    def complete(self, server: Server, prompt: str = PROMPTS[0]) -> httpx.Response:
        return self.users.post("/v1/completions", json=body(server, prompt))

    def quiet(self) -> bool:
        return all(s["queued"] == s["in_flight"] == 0 for s in self.status())

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
        self.users.close()
        self.admin.close()


def body(server: Server, prompt: str = PROMPTS[0], tokens: int = TOKENS, **more) -> dict:
    settings = {"max_tokens": tokens, "temperature": 0, **more}
    return {"model": server.model, "prompt": prompt, **settings}


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def soon(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def proxy(pair):
    with Proxy([url(server) for server in pair]) as proxy:
        yield proxy


def test_a_request_wakes_its_model_and_puts_the_other_to_sleep(pair, proxy):
    a, b = pair
    for server, other in ((a, b), (b, a), (a, b)):
        assert text(proxy.complete(server)) == server.texts[PROMPTS[0]]
        assert not server.is_sleeping() and other.is_sleeping()
        assert [s["state"] for s in proxy.status()] == [
            "awake" if s is server else "asleep" for s in pair
        ]
    assert proxy.metric("switches_total") == 3
    names = [model["id"] for model in proxy.users.get("/v1/models").json()["data"]]
    assert names == [a.model, b.model]


def test_streams_pass_through_as_they_come(pair, proxy):
    for server in pair:
        times, said = [], ""
        with proxy.users.stream(
            "POST", "/v1/completions", json=body(server, tokens=60, stream=True)
        ) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic())
                    said += json.loads(line[6:])["choices"][0]["text"]
        assert len(times) > 20
        assert times[-1] - times[0] > 0.1  # not all at the end
        assert said.startswith(server.texts[PROMPTS[0]])


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/completions", b'{"model": "nobody", "prompt": "x"}', 404),
        ("/v1/completions", b'{"prompt": "x"}', 400),
        ("/v1/completions", b'{"model": 7}', 400),
        ("/v1/completions", b"not JSON", 400),
        ("/v1/%2e%2e/sleep", b"{}", 400),
        ("/sleep", b"{}", 404),
        ("/collective_rpc", b'{"method": "reload_weights"}', 404),
    ],
)
def test_what_no_server_gets_to_see(pair, proxy, path, content, status):
    before = [server.is_sleeping() for server in pair]
    assert proxy.users.post(path, content=content).status_code == status
    assert [server.is_sleeping() for server in pair] == before


def test_the_servers_own_refusals_come_through(pair, proxy):
    answer = proxy.users.post("/v1/completions", json=body(pair[0], temperature=-1))
    assert answer.status_code == 400
    assert "temperature" in answer.text


def test_admin_sleeps_and_wakes(pair, proxy):
    a, b = pair
    woken = proxy.admin.post("/wake", params={"model": b.model}).json()
    assert woken == {"url": url(b), "state": "awake"}
    assert not b.is_sleeping() and a.is_sleeping()
    assert proxy.admin.post("/sleep", params={"model": b.model}).json()["state"] == "asleep"
    assert b.is_sleeping()
    assert proxy.admin.post("/sleep", params={"model": "nobody"}).status_code == 404
    assert proxy.users.get("/status").status_code == 404


def test_clients_that_leave_hold_nothing_up(pair, proxy):
    a, b = pair
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    long = body(a, tokens=450, stream=True, ignore_eos=True)
    with proxy.users.stream("POST", "/v1/completions", json=long) as answer:
        next(answer.iter_lines())
        # One that waits for b, and leaves before its turn.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{proxy.url}/v1/completions", json=body(b), timeout=0.2)
    soon(proxy.quiet, 3)
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]


def test_running_answers_end_before_their_model_sleeps(pair, proxy):
    a, b = pair

    async def both() -> None:
        async with httpx.AsyncClient(base_url=proxy.url, timeout=120) as http:
            long = asyncio.create_task(
                http.post("/v1/completions", json=body(a, tokens=400, ignore_eos=True))
            )
            await asyncio.sleep(0.5)
            other = await http.post("/v1/completions", json=body(b))
            assert long.done()
            answer = (await long).json()
            assert answer["usage"]["completion_tokens"] == 400
            assert text(other) == b.texts[PROMPTS[0]]

    asyncio.run(both())


def test_turns_of_no_length_still_serve_both(pair):
    async def crowd(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            requests = [http.post("/v1/completions", json=body(s)) for s in pair for _ in range(4)]
            return [text(answer) for answer in await asyncio.gather(*requests)]

    with Proxy([url(server) for server in pair], "--turn-s", "0") as proxy:
        expected = [server.texts[PROMPTS[0]] for server in pair for _ in range(4)]
        assert asyncio.run(crowd(proxy.url)) == expected
        assert proxy.metric("switches_total") <= 4


def test_a_full_queue_refuses_and_says_when_to_come_again(pair):
    a, b = pair

    async def crowd(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            requests = (http.post("/v1/completions", json=body(b)) for _ in range(12))
            return await asyncio.gather(*requests)

    with Proxy([url(server) for server in pair], "--max-queue", "4") as proxy:
        assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
        answers = asyncio.run(crowd(proxy.url))
        refused = [answer for answer in answers if answer.status_code == 503]
        served = [text(answer) for answer in answers if answer.status_code != 503]
        assert len(refused) == 8 and len(served) == 4
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert set(served) == {b.texts[PROMPTS[0]]}


def test_an_idle_server_falls_asleep(pair):
    a, _ = pair
    with Proxy([url(server) for server in pair], "--idle-s", "1", "--level", "2") as proxy:
        for _ in range(2):
            assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
            assert not a.is_sleeping()
            soon(a.is_sleeping, 5)


def test_a_wake_that_fails_fails_its_requests_alone(pair, proxy):
    a, b = pair
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    a.faults.write_text("aclrtMallocPhysical:1:507899:1000000")
    failed = proxy.complete(b)
    assert failed.status_code == 503
    assert "aclrtMallocPhysical" in failed.json()["error"]["message"]
    a.faults.write_text("")
    assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
    assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
    assert proxy.metric("failures_total") == 1


def test_a_closed_loop_of_clients_over_two_models(pair):
    used: list[int] = []
    answered: list[str] = []

    async def client(number: int, url: str, end: float) -> None:
        choose = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.monotonic() < end:
                server, prompt = choose.choice(pair), choose.choice(PROMPTS)
                answer = await http.post("/v1/completions", json=body(server, prompt))
                assert text(answer) == server.texts[prompt]
                assert answer.json()["model"] == server.model
                answered.append(server.model)

    async def watch(end: float) -> None:
        async with httpx.AsyncClient(base_url=url(pair[0]), timeout=60) as http:
            while time.monotonic() < end:
                (rank,) = (await http.get("/sleep_status")).json()["ranks"]
                used.append(rank["total"] - rank["free"])
                await asyncio.sleep(0.02)

    async def load(url: str) -> None:
        end = time.monotonic() + LOAD_S
        clients = [client(number, url, end) for number in range(CLIENTS)]
        await asyncio.gather(watch(end), *clients)

    with Proxy([url(server) for server in pair], "--turn-s", "1") as proxy:
        asyncio.run(load(proxy.url))
        switches = proxy.metric("switches_total")
        assert proxy.metric('requests_total{server="') == len(answered)
        assert proxy.quiet()
        assert proxy.metric("failures_total") == 0
    shares = [answered.count(server.model) for server in pair]
    print(f"{len(answered)} answers, {shares} by model, {switches:.0f} switches, {LOAD_S:.0f} s")
    assert min(shares) > 0.25 * len(answered)  # neither starves
    assert LOAD_S / 8 < switches <= LOAD_S  # a turn is a second or more
    # Both awake would hold the sum.
    assert len(used) > LOAD_S
    assert max(used) <= max(server.alone for server in pair) + 100 * MIB
    assert min(server.alone for server in pair) > 250 * MIB


def test_a_server_that_dies_leaves_the_other_served(pair):
    a, b = pair
    nobody = "http://127.0.0.1:9"
    with Proxy([nobody, url(a), url(b)]) as proxy:
        assert text(proxy.complete(b)) == b.texts[PROMPTS[0]]
        b.kill()
        gone = proxy.complete(b)
        assert gone.status_code == 502
        assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
        gone = proxy.complete(b)
        assert gone.status_code == 503
        assert "cannot connect" in gone.json()["error"]["message"]
        assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
