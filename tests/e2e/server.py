# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` process, and what tests ask of it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

SMALL = ("--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "8")

HBM_GIB = 1
MEMORY = ("--gpu-memory-utilization", "0.5")


def free_ports(count: int) -> list[int]:
    """Of the loopback, no two alike."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def set_faults(file: Path, rules: str) -> None:
    """From its next call on, the simulated device of the server that reads this file obeys them.

    It looks at the file's time every few milliseconds, in which it would miss a second change, and
    would read a file that is being written."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(rules)
    os.replace(new, file)
    time.sleep(0.01)


class Server:
    """One server process group on a loopback port (0: a free one). Usable as a context manager."""

    def __init__(
        self,
        model: Path,
        *options: str,
        log: Path,
        env: dict[str, str] | None = None,
        port: int = 0,
    ):
        self.model = str(model)
        self.log = log
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model),
                    *("--host", "127.0.0.1", "--port", str(self.port), *options),
                ],
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(env or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(time.monotonic() + 480)
        except BaseException:
            self.kill()
            raise

    def _wait_until_healthy(self, deadline: float) -> None:
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.http.get("/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.25)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-6000:]}")

    def post(self, path: str, **kwargs: Any) -> Any:
        """The JSON answer of a POST that must succeed."""
        answer = self.http.post(path, **kwargs)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def rank_status(self) -> dict[str, Any]:
        """What the one rank says of itself."""
        (status,) = self.http.get("/sleep_status").json()["ranks"]
        return status

    def is_sleeping(self) -> bool:
        return self.http.get("/is_sleeping").json()["is_sleeping"]

    def complete(self, prompt: str = "The future of AI is", tokens: int = 8) -> str:
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return self.post("/v1/completions", json=body)["choices"][0]["text"]

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """End the server and every process that it started."""
        if self.process.poll() is None or sig == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sig)
        self.process.wait(timeout=60)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.close()
        self.kill()
