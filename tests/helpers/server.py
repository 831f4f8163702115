# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` process."""

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil

from helpers import report, warm
from helpers.patience import patience, wait_for

SMALL = ("--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "8")

HBM_GIB = 1
MEMORY = ("--gpu-memory-utilization", "0.5")


def free_ports(count: int) -> list[int]:
    """Different free ports of the loopback interface."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def http_client(url: str, **options: Any) -> httpx.Client:
    """A connection for each request: a server closes those that rest, and after an error of its own
    any, and a request on one that is about to close fails."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, timeout=120 * patience(), limits=limits, **options)


class Server:
    """A server process group on a loopback port (0 for a free one), as a context manager.

    ``cold`` starts it in a new interpreter, as users do, for tests of the start-up itself.
    """

    def __init__(
        self,
        model: Path,
        *options: str,
        log: Path,
        env: dict[str, str] | None = None,
        port: int = 0,
        cold: bool = False,
    ):
        self.model = str(model)
        self.log = log
        self.port = port or free_ports(1)[0]
        self.http = http_client(f"http://127.0.0.1:{self.port}")
        with report.start_of("server"):
            self.process = (warm.ColdProcess if cold else warm.WarmProcess)(
                [
                    *("-m", "vllm.entrypoints.cli.main", "serve", self.model),
                    *("--host", "127.0.0.1", "--port", str(self.port), *options),
                ],
                log,
                {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(env or {})},
            )
            try:
                wait_for(self._serves, f"server {log} is up", 240)
            except BaseException:
                self.kill()
                raise

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the server did not start:\n{self.log.read_text()[-6000:]}")
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health", timeout=2).status_code == 200
        return False

    def post(self, path: str, **kwargs: Any) -> Any:
        """POST, check for success, and return the JSON answer."""
        answer = self.http.post(path, **kwargs)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def rank_status(self) -> dict[str, Any]:
        """The status of the server's only rank."""
        (status,) = self.http.get("/sleep_status").json()["ranks"]
        return status

    def is_sleeping(self) -> bool:
        return self.http.get("/is_sleeping").json()["is_sleeping"]

    def runs_requests(self) -> bool:
        """Whether one of its engines is computing a request."""
        lines = self.http.get("/metrics").text.splitlines()
        return any("num_requests_running{" in line and line[-4:] != " 0.0" for line in lines)

    def complete(self, prompt: str = "The future of AI is", tokens: int = 8) -> str:
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return self.post("/v1/completions", json=body)["choices"][0]["text"]

    def engine(self) -> psutil.Process:
        """The engine's process."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        (engine,) = [child for child in children if "EngineCore" in "".join(child.cmdline())]
        return engine

    def kill(self) -> None:
        """Kill the server and every process that it started, and wait for them."""
        group = self._group()
        warm.kill_group(self.process.pid)
        self.process.wait(60)
        psutil.wait_procs(group, timeout=60)

    def _group(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid:
                    found.append(process)
        return found

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.close()
        self.kill()


class InBackground:
    """A POST in a thread, whose answer is read later."""

    def __init__(self, server: Server, path: str, **options: Any) -> None:
        self._answers: list[httpx.Response] = []

        def post() -> None:
            self._answers.append(server.http.post(path, **options))

        self._thread = threading.Thread(target=post)
        self._thread.start()

    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def answer(self) -> httpx.Response:
        wait_for(self.is_done, "the answer", 60)
        (answer,) = self._answers
        return answer
