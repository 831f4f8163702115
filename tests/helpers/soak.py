# SPDX-License-Identifier: Apache-2.0
"""Clients request completions while a server sleeps and wakes at random.

Some clients request completions at temperature 0 all the time, with known answers. Another one puts
the server to sleep and wakes it, with random levels, pause modes and orders of tags, and loads the
weights again after level 2. No answer may be wrong, only requests aborted by mode ``abort`` may be
lost, and no memory may grow.
"""

import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import httpx

from helpers import MIB
from helpers.patience import deadline
from helpers.server import HBM_GIB, MEMORY, SMALL, Server, http_client

PROMPTS = {
    "The future of AI is": 12,
    "Once upon a time": 40,
    "import os\nimport sys\n": 24,
    "1 + 1 =": 4,
    "a b c d e f g h i j k l m n o p " * 6: 16,
}
CLIENTS = 4


@dataclass
class Result:
    """The result; times are seconds, memory is bytes."""

    seed: int
    answered: int = 0
    aborted: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    sleeps: Counter = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)


class Soak:
    """The clients of one server, in this process."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.result = Result(seed)
        self.aborts_begun = self.aborts_ended = 0  # sleeps in mode abort
        self.stop = threading.Event()
        self.clients: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.expected = {prompt: self.ask(server.http, prompt) for prompt in PROMPTS}

    def run(self, rounds: int) -> Result:
        self.cycles(random.Random(self.result.seed), 1)
        self.result.first = self.figures()
        self.clients = [threading.Thread(target=self.client, args=(n,)) for n in range(CLIENTS)]
        for client in self.clients:
            client.start()
        try:
            self.cycles(random.Random(self.result.seed + 1), rounds)
        finally:
            self.stop.set()
            for client in self.clients:
                client.join()
            self.clients = []
        self.result.last = self.figures()
        return self.result

    def fail(self, what: str) -> None:
        with self.lock:
            self.result.failures.append(what)
        self.stop.set()

    def ask(self, http: httpx.Client, prompt: str) -> tuple[str, str]:
        body = {"model": self.server.model, "prompt": prompt, "max_tokens": PROMPTS[prompt]}
        answer = http.post("/v1/completions", json={**body, "temperature": 0, "ignore_eos": True})
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code} {answer.text}")
        choice = answer.json()["choices"][0]
        return choice["text"], choice["finish_reason"]

    def client(self, number: int) -> None:
        chance = random.Random(self.result.seed * 1000 + number)
        with http_client(str(self.server.http.base_url)) as http:
            while not self.stop.is_set():
                prompt = chance.choice(list(PROMPTS))
                ended, start = self.aborts_ended, time.monotonic()
                try:
                    text, reason = self.ask(http, prompt)
                except (RuntimeError, httpx.HTTPError) as error:
                    self.fail(f"request lost: {error!r}")
                    return
                self.judge(prompt, text, reason, may_abort=self.aborts_begun > ended)
                with self.lock:
                    self.result.slowest_s = max(self.result.slowest_s, time.monotonic() - start)

    def judge(self, prompt: str, text: str, reason: str, may_abort: bool) -> None:
        expected, normal = self.expected[prompt]
        if reason == "abort":
            if not may_abort or not expected.startswith(text):
                self.fail(f"{prompt!r} was aborted with {text!r}; abort sleeps: {may_abort}")
            with self.lock:
                self.result.aborted += 1
        elif (text, reason) != (expected, normal):
            self.fail(f"{prompt!r}: {text!r} ({reason}) instead of {expected!r}")
        else:
            with self.lock:
                self.result.answered += 1

    def cycles(self, chance: random.Random, rounds: int) -> None:
        """Each round covers every level in every mode, in random order."""
        for _ in range(rounds):
            ways = list(product((0, 1, 2), ("abort", "wait", "keep")))
            chance.shuffle(ways)
            for level, mode in ways:
                if self.stop.is_set():
                    return
                try:
                    self.cycle(chance, level, mode)
                except (AssertionError, httpx.HTTPError) as error:
                    self.fail(f"cycle failed: {error!r}")
                self.let_some_be_answered()

    def let_some_be_answered(self) -> None:
        """Wait until some requests are answered, if there are clients."""
        before, end = self.result.answered, deadline(30)
        while self.clients and not self.stop.is_set() and self.result.answered < before + 2:
            assert time.monotonic() < end, "no request is answered"
            time.sleep(0.02)

    def cycle(self, chance: random.Random, level: int, mode: str) -> None:
        self.result.sleeps[f"level {level}, {mode}"] += 1
        self.aborts_begun += mode == "abort"
        self.server.post("/sleep", params={"level": level, "mode": mode})
        self.aborts_ended += mode == "abort"
        time.sleep(chance.uniform(0, 0.4))
        if level == 0:
            if chance.random() < 0.3 and mode != "wait":
                self.server.post("/release_kv_cache_memory")
            self.server.post("/wake_up")
            return
        tags = self.server.rank_status()["tags"].values()
        assert sum(tag["device"] for tag in tags) == 0, f"asleep, and holds {tags}"
        if level == 1 and chance.random() < 0.2:
            self.server.post("/sleep", params={"level": 2})
            level = 2
        if level == 2:
            self.server.post("/wake_up", params={"tags": "weights"})
            self.server.post("/collective_rpc", json={"method": "reload_weights"})
            self.server.post("/wake_up", params={"tags": "kv_cache"})
            # While requests hold blocks, a plain reset returns 200 and does nothing.
            reset = self.server.post("/reset_prefix_cache?reset_running_requests=true")
            assert reset["success"], f"the prefix cache was not reset: {reset}"
            return
        order = chance.choice((["weights", "kv_cache"], ["kv_cache", "weights"], [None]))
        for tag in order:
            self.server.post("/wake_up", params={} if tag is None else {"tags": tag})

    def figures(self) -> dict[str, int]:
        """What the idle server holds after a wake from level 1."""
        self.server.post("/sleep", params={"level": 1, "mode": "wait"})
        self.server.post("/wake_up")
        for prompt in PROMPTS:
            if self.ask(self.server.http, prompt) != self.expected[prompt]:
                self.fail(f"{prompt!r}: another answer than at the start")
        status = self.server.rank_status()
        figures = {
            "device_used": status["total"] - status["free"],
            "device_tagged": sum(tag["device"] for tag in status["tags"].values()),
            "host_backup": status["host_backup"],
            "resident": 0,
            "descriptors": 0,
            "threads": 0,
        }
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(process.name)) != self.server.process.pid:
                    continue
                fields = dict(
                    line.split(":", 1) for line in (process / "status").read_text().splitlines()
                )
                figures["resident"] += int(fields["VmRSS"].split()[0]) * 1024
                figures["threads"] += int(fields["Threads"])
                figures["descriptors"] += len(list((process / "fd").iterdir()))
            except (OSError, KeyError):
                continue  # it has ended, or is a kernel thread
        return figures


def growth(result: Result) -> list[str]:
    """Figures that grew beyond noise."""
    allowed = {
        "device_used": 2 * MIB,
        "device_tagged": 0,
        "host_backup": 0,
        "resident": 96 * MIB,
        "descriptors": 8,
        "threads": 6,
    }
    return [
        f"{name} grew from {result.first[name]} to {result.last[name]}"
        for name, slack in allowed.items()
        if result.last[name] > result.first[name] + slack
    ]


def soak(model: Path, rounds: int, seed: int, log: Path) -> Result:
    """Start a server on its own simulated NPU, and run that many rounds."""
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"soak-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
    }
    options = ("--enable-sleep-mode", "--dtype", "float32", *SMALL, *MEMORY)
    with Server(model, *options, log=log, env=env) as server:
        return Soak(server, seed).run(rounds)
