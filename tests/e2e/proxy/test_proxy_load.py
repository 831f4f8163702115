# SPDX-License-Identifier: Apache-2.0
"""A closed loop of clients over two models, and over three models of which two can be awake."""

import asyncio
import math
import random
import time

import httpx
import pytest
from helpers import MIB
from helpers.patience import deadline, patience
from helpers.proxy import PROMPTS, Proxy, body, text, url
from helpers.server import Server

from .conftest import API_KEY

CLIENTS = 16
KEY = {"Authorization": f"Bearer {API_KEY}"}


class Load:
    """A closed loop over ``servers`` through ``proxy``, and its results.

    Records the model of each answer (all must be right), the device's memory and the proxy's
    states. Runs for ``seconds``, or up to a minute longer until there have been that many
    ``switches``.
    """

    def __init__(
        self, proxy: Proxy, servers: list[Server], seconds: float, switches: int = 0
    ) -> None:
        self.answered: list[str] = []
        self.used: list[int] = []
        self.awake: list[int] = []
        self._servers = servers
        self._end = time.monotonic() + seconds
        self._at_the_latest = deadline(seconds + 60)
        began = time.monotonic()
        self._wanted = switches
        asyncio.run(self._run(proxy))
        self.seconds = time.monotonic() - began
        self.switches = proxy.metric("switches_total")
        shares = [self.answered.count(server.model) for server in servers]
        print(f"{len(self.answered)} answers, {shares} by model, {self.switches:.0f} switches")
        assert proxy.metric('requests_total{server="') == len(self.answered)
        assert proxy.quiet()
        assert proxy.metric("failures_total") == 0
        assert min(shares) > 0.5 * len(self.answered) / len(servers)  # none starves
        assert len(self.used) > seconds / patience()

    async def _run(self, proxy: Proxy) -> None:
        clients = [self._client(number, proxy.url) for number in range(CLIENTS)]
        await asyncio.gather(self._watch(proxy), *clients)

    async def _client(self, number: int, url: str) -> None:
        choose = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=300, headers=KEY) as http:
            while time.monotonic() < self._end:
                server, prompt = choose.choice(self._servers), choose.choice(PROMPTS)
                answer = await http.post("/v1/completions", json=body(server, prompt))
                assert text(answer) == server.texts[prompt]
                assert answer.json()["model"] == server.model
                self.answered.append(server.model)

    async def _watch(self, proxy: Proxy) -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            while time.monotonic() < self._end:
                answer = await http.get(f"{url(self._servers[0])}/sleep_status")
                (rank,) = answer.json()["ranks"]
                self.used.append(rank["total"] - rank["free"])
                status = (await http.get(f"{proxy.admin.base_url}/status")).json()["servers"]
                self.awake.append(sum(server["state"] == "awake" for server in status))
                now = time.monotonic()
                if now > self._end - 1 and proxy.metric("switches_total") < self._wanted:
                    self._end = min(now + 2, self._at_the_latest)
                await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds", [12, pytest.param(300, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_a_closed_loop_of_clients_over_two_models(pair, seconds):
    switches = math.ceil(seconds / 8)
    with Proxy(pair, "--turn-s", "1") as proxy:
        load = Load(proxy, pair, seconds, switches)
    assert switches <= load.switches <= load.seconds + 1  # a turn is a second or more
    assert max(load.awake) == 1
    # Both awake would hold the sum, and the smaller share is twice what is allowed for the rest.
    assert max(load.used) <= max(server.alone for server in pair) + 100 * MIB
    assert min(server.alone for server in pair) > 200 * MIB


@pytest.mark.slow
def test_two_of_three_awake(pair, third):
    servers = [*pair, third]
    with Proxy(
        servers, "--turn-s", "0.5", "--max-awake", "2", env={"VLLM_API_KEY": API_KEY}
    ) as proxy:
        load = Load(proxy, servers, 6, switches=4)
        assert sum(not server.is_sleeping() for server in servers) == 2
    assert load.switches >= 4
    assert max(load.awake) == 2
    # More than one alone holds, and never what three would.
    alone = sorted(server.alone for server in servers)
    assert alone[-1] + 100 * MIB < max(load.used) <= sum(alone[1:]) + 100 * MIB
