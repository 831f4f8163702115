# SPDX-License-Identifier: Apache-2.0
"""As many real servers are awake as fit on the simulated NPU by their bytes."""

from helpers import MIB
from helpers.proxy import PROMPTS, Proxy, text, used

from .conftest import API_KEY


def test_two_of_three_fit(pair, third):
    """Each may use 0.4 of the device."""
    a, b = pair
    options = ("--max-awake", "fit", "--turn-s", "0")
    with Proxy([a, b, third], *options, env={"VLLM_API_KEY": API_KEY}) as proxy:
        proxy.users.headers["Authorization"] = f"Bearer {API_KEY}"
        try:
            for server in (a, b):
                assert text(proxy.complete(server)) == server.texts[PROMPTS[0]]
            assert proxy.states() == ["awake", "awake", "asleep"]
            assert used(a) > max(a.alone, b.alone) + 100 * MIB
            assert text(proxy.complete(third)) == third.texts[PROMPTS[0]]
            assert proxy.states() == ["asleep", "awake", "awake"]
            switches = proxy.metric("switches_total")
            for server in (b, third, b):
                assert text(proxy.complete(server)) == server.texts[PROMPTS[0]]
            assert proxy.metric("switches_total") == switches
            assert text(proxy.complete(a)) == a.texts[PROMPTS[0]]
            assert proxy.states() == ["awake", "awake", "asleep"]
            assert proxy.metric("failures_total") == 0
        finally:
            for server in (a, b, third):  # as other tests expect them
                proxy.admin.post("/sleep", params={"model": server.model})
