# SPDX-License-Identifier: Apache-2.0
"""Many clients over more models than fit, while servers and the proxy are killed.

The servers are stand-ins for vLLM, whose journal says who was on the device when.
"""

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
from helpers.fleet import Fleet, stand_in
from helpers.patience import wait_for

MODELS = ("a", "b", "c", "d")
FIT = 2
CLIENTS = 16
ENOUGH = 40  # answers for each model, between two events


class Clients:
    """Ask models until ``stop``; count the answers by model and status."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.counts: Counter[tuple[str, int]] = Counter()
        self.lost: Counter[str] = Counter()  # without an answer, while there was no proxy
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._clients = [self._pool.submit(self._ask, number) for number in range(CLIENTS)]

    def _ask(self, number: int) -> None:
        choose = random.Random(number)
        while not self._stopped.is_set():
            model = choose.choice(MODELS)
            try:
                answer = self.fleet.ask(model)
            except httpx.TransportError:
                self.lost[model] += 1
                time.sleep(0.05)
                continue
            assert answer.status_code != 200 or answer.json()["model"] == model
            self.counts[model, answer.status_code] += 1

    def served(self) -> int:
        """Answers for the model that has the fewest."""
        return min(self.counts[model, 200] for model in MODELS)

    def serve_more(self) -> None:
        before = self.served()
        wait_for(lambda: self.served() >= before + ENOUGH, "answers for all models", 60)

    def stop(self) -> None:
        self._stopped.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()


def most_at_once(events: list[str]) -> int:
    """How many models were on the device at once."""
    there: set[str] = set()
    most = 0
    for event in events:
        model, what = event.split()[:2]
        if what in ("starts", "wakes"):
            there.add(model)
        elif what in ("sleeps", "dies", "ends"):
            there.discard(model)
        most = max(most, len(there))
    return most


def test_servers_and_the_proxy_are_killed_under_load(tmp_path):
    models = {name: stand_in(tmp_path, name, devices=0) for name in MODELS}
    options = ("--max-awake", str(FIT), "--turn-s", "0.05")
    with Fleet(tmp_path, models, *options) as fleet:
        clients = Clients(fleet)
        try:
            clients.serve_more()
            for model in ("a", "b"):
                pid = fleet.status()[model]["pid"]
                os.kill(pid, signal.SIGSTOP)  # so that it writes nothing after this
                with open(fleet.journal, "a") as journal:
                    journal.write(f"{model} dies\n")
                os.kill(pid, signal.SIGKILL)
                clients.serve_more()
            assert not clients.lost
            pids = {name: fleet.status()[name]["pid"] for name in MODELS}
            fleet.process.kill()
            fleet.process.wait()
            fleet.start()
            clients.serve_more()
            assert {name: fleet.status()[name]["pid"] for name in MODELS} == pids
        finally:
            clients.stop()
        print(dict(clients.counts), dict(clients.lost))
        failed = {key: count for key, count in clients.counts.items() if key[1] != 200}
        assert {model for model, _ in failed} <= {"a", "b"}  # those that were killed
        assert {status for _, status in failed} <= {502, 503}
        assert sum(failed.values()) <= 2 * CLIENTS
        assert most_at_once(fleet.events()) == FIT
        assert Counter(event for event in fleet.events() if "starts" in event) == {
            **{f"{name} starts 0": 1 for name in ("c", "d")},
            **{f"{name} starts 0": 2 for name in ("a", "b")},
        }
