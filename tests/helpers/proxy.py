# SPDX-License-Identifier: Apache-2.0
"""A proxy process, and requests through it."""

import contextlib
import os
import subprocess
import sys

import httpx

from helpers.patience import patience, wait_for
from helpers.server import Server, free_ports, http_client
from vllm_sleep_ascend import admin_key

PROMPTS = ["The future of AI is", "One day a fox", "import os\n", "def main(", "Once more"]
TOKENS = 12


def command(servers: list[Server], *options: str) -> list[str]:
    addresses = (f"{url(s)},{s.door}" if hasattr(s, "door") else url(s) for s in servers)
    return [sys.executable, "-m", "vllm_sleep_ascend.proxy", *addresses, *options]


def admin_client(port: int, environment: dict[str, str]) -> httpx.Client:
    """Of the admin port of a proxy with this environment."""
    key = environment.get(admin_key.VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return http_client(f"http://127.0.0.1:{port}", headers=headers)


class Proxy:
    """A proxy process in front of some servers."""

    def __init__(self, servers: list[Server], *options: str, env: dict[str, str] | None = None):
        self.port, self.admin_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.users = http_client(self.url)
        self.admin = admin_client(self.admin_port, env or {})
        ports = ("--port", str(self.port), "--admin-port", str(self.admin_port))
        self.process = subprocess.Popen(
            command(servers, *ports, *options), env={**os.environ, **(env or {})}
        )
        wait_for(self._knows_models, "the proxy knows a model", 60)

    def _knows_models(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return any(server["models"] for server in self.status())
        return False

    def status(self) -> list[dict]:
        return self.admin.get("/status").json()["servers"]

    def states(self) -> list[str]:
        return [server["state"] for server in self.status()]

    def metric(self, name: str) -> float:
        """The value of a metric, summed over all labels."""
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
            self.process.wait(20 * patience())
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


def used(server: Server) -> int:
    """Bytes of the server's device used by all processes."""
    status = server.rank_status()
    return status["total"] - status["free"]


def generated(server: Server) -> float:
    """Tokens that the server has generated so far."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:generation_tokens_total"))
