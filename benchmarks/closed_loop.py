# SPDX-License-Identifier: Apache-2.0
"""Clients in a closed loop over more models than fit, through the proxy and real vLLM servers, and
the same with processes that are stopped and started in place of sleeps and wakes.

Runs on a simulated NPU: npu-sim python benchmarks/closed_loop.py MODEL..., with folders that give
the models their names. A server that is awake is killed meanwhile, later another one, and then the
proxy is started again. Fails unless each answer was that of its model, only requests that a killed
server had, or got until the proxy noticed, were lost, by a 502 and before it served again, never
more models were awake than fit, and all of them together held no more than the shares of those. A
wait is from the first attempt of a request until its answer.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import httpx
from bench.report import print_table, write_json
from bench.virtual import quantile

from vllm_sleep_ascend.proxy.launch import ports

PROMPTS = ("The future of AI is", "One day a fox", "import os\n", "def main(", "Once more")
TOKENS = 12
FIT, SHARE = 2, 0.4  # models that are awake at once, and the part of the device that each may use
OPTIONS = (
    *("--enable-sleep-mode", "--dtype", "float32", "--gpu-memory-utilization", str(SHARE)),
    *("--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "8"),
    *("--additional-config", '{"sleep_mode": {"chunk_mib": 2, "admin_port": ${ADMIN_PORT}}}'),
)
SLEEPS = ("-m", "vllm_sleep_ascend.proxy")
STOPS = (
    "-c",
    "from vllm_sleep_ascend.proxy import __main__ as proxy\n"
    "from vllm_sleep_ascend.proxy.operations import Operations\n"
    "async def end(self, server, deep=False):\n"
    "    server.state, server.open = 'stopping', False\n"
    "    await server.launched.end()\n"
    "    return not server.on_device\n"
    "Operations.sleep = end\n"
    "raise SystemExit(proxy.main())",
)
WAYS = {"sleep and wake": SLEEPS, "stop and start": STOPS}
LONGEST_S = 1800.0


class Proxy:
    """The proxy's process, and those of its servers."""

    def __init__(self, program: tuple[str, ...], models: list[Path], folder: Path) -> None:
        port = ports.free(set())
        admin_port = ports.free({port})
        self.url, self._admin = (f"http://127.0.0.1:{number}" for number in (port, admin_port))
        self.log, config = folder / "proxy.log", folder / "models.yaml"
        entries = {model.name: {"command": _command(model), "devices": 0} for model in models}
        config.write_text(json.dumps({"models": entries, "max_awake": "fit"}))  # which is YAML too
        where = ("--config", str(config), "--state-dir", str(folder / "state"))
        on = ("--port", str(port), "--admin-port", str(admin_port), "--max-queue", "10000")
        grace = ("--grace-s", str(int(LONGEST_S)))
        self._command = [sys.executable, *program, *where, *on, *grace]
        machine = {"NPU_SIM_MACHINE": f"loop-{os.getpid()}-{port}", "NPU_SIM_HBM_GIB": "1"}
        self._environment = {**os.environ, **machine}
        self.groups: set[int] = set()

    async def start(self, *options: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, *options], env=self._environment, stdout=log, stderr=log
            )
        while not await self._is_up():
            await asyncio.sleep(0.1)

    async def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise SystemExit(f"the proxy has ended:\n{self.log.read_text()[-4000:]}")
        with contextlib.suppress(httpx.TransportError):
            return (await self._get("/health")).status_code == 200
        return False

    async def end(self) -> None:
        """SIGTERM, and wait until what it has accepted has been answered."""
        self.process.terminate()
        await asyncio.to_thread(self.process.wait, LONGEST_S)

    async def _get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            return await http.get(self._admin + path)

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = (await self._get("/status?memory=1")).json()
        self.groups = {server["pid"] for server in status["servers"] if server["pid"]}
        return status

    async def count(self, *names: str) -> float:
        wanted = tuple(f"sleep_proxy_{name}_total" for name in names)
        lines = (await self._get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))


def _command(model: Path) -> list[str]:
    serve = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model.resolve()))
    where = ("--host", "127.0.0.1", "--port", "${PORT}", "--served-model-name", model.name)
    return [*serve, *where, *OPTIONS]


@dataclass
class Kill:
    """Times of a server's death: until the proxy has ``noticed``, and until it serves ``again``."""

    model: str
    pid: int
    at: float
    noticed: float = inf
    again: float = inf

    def look(self, server: dict[str, Any], now: float) -> None:
        is_awake, is_another = server["state"] == "awake", server["pid"] != self.pid
        if is_another or not is_awake:
            self.noticed = min(self.noticed, now)
        if is_another and is_awake:
            self.again = min(self.again, now)


@dataclass(frozen=True)
class Lost:
    """A request without an answer."""

    model: str
    status: int
    began: float
    ended: float

    def is_by(self, kill: Kill) -> bool:
        return (
            (self.model, self.status) == (kill.model, 502)
            and self.began < kill.noticed
            and kill.at < self.ended < kill.again
        )


class Loop:
    """Clients of ``proxy``, and what they have seen."""

    def __init__(self, proxy: Proxy, names: list[str]) -> None:
        self.proxy, self._names = proxy, names
        self._texts: dict[tuple[str, str], str] = {}
        self.waits: list[float] = []
        self.lost: list[Lost] = []
        self.killed: list[Kill] = []
        self.used: list[float] = []  # parts of the device
        self.total = 0
        self.awake: list[int] = []
        self.switches = self.failures = 0.0
        self._until = 0.0
        self._restarting = False

    async def run(self, clients: int, seconds: float) -> None:
        for model in self._names:  # which starts them
            for prompt in PROMPTS:
                answer = await self._ask(model, prompt)
                self._texts[model, prompt] = answer.raise_for_status().json()["choices"][0]["text"]
        before = await self.proxy.count("switches", "starts")
        self._until = time.monotonic() + seconds
        working = [asyncio.create_task(self._client(number)) for number in range(clients)]
        watching = asyncio.create_task(self._watch())
        for happens in (self._kill, self._kill, self._restart):
            await asyncio.sleep(seconds / 4)
            await happens()
        await asyncio.gather(*working)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching  # which raises what has ended it before
        await self._note_counts()
        self.switches -= before

    async def _client(self, number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < self._until:
            model, prompt = choose.choice(self._names), choose.choice(PROMPTS)
            began = time.monotonic()
            answer = await self._ask(model, prompt)
            if answer.status_code != 200:
                self.lost.append(Lost(model, answer.status_code, began, time.monotonic()))
                continue
            content = answer.json()
            found = (content["model"], content["choices"][0]["text"])
            if found != (model, self._texts[model, prompt]):
                raise SystemExit(f"{model} was asked {prompt!r}, and {found} came")
            self.waits.append(time.monotonic() - began)

    async def _ask(self, model: str, prompt: str) -> httpx.Response:
        """Again and again while nobody listens. A request that was accepted is sent once, but a
        proxy that ends drops connections that it has not accepted yet."""
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        while True:
            try:
                async with httpx.AsyncClient(timeout=LONGEST_S, trust_env=False) as http:
                    return await http.post(f"{self.proxy.url}/v1/completions", json=body)
            except (httpx.ConnectError, httpx.ReadError) as error:
                if isinstance(error, httpx.ReadError) and not self._restarting:
                    raise
                await asyncio.sleep(0.1)

    async def _watch(self) -> None:
        while True:
            asked = time.monotonic()
            with contextlib.suppress(httpx.TransportError):
                status = await self.proxy.status()
                servers = {server["name"]: server for server in status["servers"]}
                states = [server["state"] for server in servers.values()]
                self.awake.append(sum(state in ("awake", "starting") for state in states))
                for device in status["devices"]:
                    self.total = device["total"]
                    self.used.append(1 - device["free"] / device["total"])
                for kill in self.killed:
                    if kill.at < asked:
                        kill.look(servers[kill.model], time.monotonic())
            await asyncio.sleep(0.2)

    async def _kill(self) -> None:
        """Kill a server that is working, another one than before."""
        before = {kill.model for kill in self.killed}
        while True:
            servers = (await self.proxy.status())["servers"]
            busy = [s for s in servers if s["in_flight"] and s["name"] not in before]
            if busy:
                break
            await asyncio.sleep(0.02)
        self.killed.append(Kill(busy[0]["name"], busy[0]["pid"], time.monotonic()))
        os.kill(busy[0]["pid"], signal.SIGKILL)

    async def _restart(self) -> None:
        await self._note_counts()
        self._restarting = True
        await self.proxy.end()
        await self.proxy.start()
        self._restarting = False

    async def _note_counts(self) -> None:
        """Of the proxy that runs, whose counters end with it."""
        self.switches += await self.proxy.count("switches", "starts")
        self.failures += await self.proxy.count("failures")

    def figures(self) -> dict[str, Any]:
        return {
            "answers": len(self.waits),
            "switches": self.switches,
            "p50_s": quantile(self.waits, 0.5),
            "p95_s": quantile(self.waits, 0.95),
            "longest_s": max(self.waits),
            "lost": len(self.lost),
            "lost_after_s": max(map(self._lost_after, self.lost), default=0.0),
            "most_awake": max(self.awake),
            "most_bytes": round(max(self.used) * self.total),
        }

    def check(self) -> list[str]:
        """What is not as it has to be."""
        found = [
            f"no kill explains that a request got {lost}; there were {self.killed}"
            for lost in self.lost
            if not any(map(lost.is_by, self.killed))
        ]
        if max(self.used) > FIT * SHARE:
            found.append(f"{max(self.used):.2f} of the device was in use, by shares of {SHARE}")
        if max(self.awake) > FIT:
            found.append(f"{max(self.awake)} models were awake at once")
        if self.failures:
            found.append(f"{self.failures:.0f} starts, sleeps or wakes failed")
        return found

    def _lost_after(self, lost: Lost) -> float:
        return min(lost.ended - kill.at for kill in self.killed if lost.is_by(kill))


async def measure(way: str, models: list[Path], clients: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        proxy = Proxy(WAYS[way], models, Path(folder))
        try:
            await proxy.start("--leave-servers")
            loop = Loop(proxy, [model.name for model in models])
            await loop.run(clients, seconds)
            if problems := loop.check():
                raise SystemExit("\n".join([f"{way}:", *problems, proxy.log.read_text()[-8000:]]))
            await proxy.end()
        finally:
            proxy.process.kill()
            for group in proxy.groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
    return loop.figures()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folder of one")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600.0, help="of each loop")
    parser.add_argument("--out", type=Path, help="a folder for closed_loop.json")
    args = parser.parse_args()
    columns = ("answers", "switches", "p50_s", "p95_s", "longest_s", "lost", "lost_after_s")
    rows, result = [["way", *columns]], {}
    for way in args.ways:
        result[way] = asyncio.run(measure(way, args.models, args.clients, args.seconds))
        result[way]["load_average"] = os.getloadavg()[1]
        print(way, json.dumps(result[way]), file=sys.stderr, flush=True)
        rows.append([way, *(f"{result[way][name]:.2f}" for name in columns)])
    if len(result) > 1:
        first, second = (result[way] for way in WAYS)
        ratios = (f"{second[name] / first[name]:.1f}" for name in columns[2:5])
        rows.append(["ratio", "", "", *ratios, "", ""])
    print_table(rows)
    if args.out is not None:
        settings = {"cores": os.cpu_count(), "machine": platform.machine(), "device": "sim"}
        write_json(args.out / "closed_loop.json", {"settings": settings, "ways": result})


if __name__ == "__main__":
    main()
