# SPDX-License-Identifier: Apache-2.0
"""vLLM servers of an experiment: started, prompted, measured, stopped. Checks every HTTP status."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

POLL_S = 0.05
START_S = 1800.0


class ExperimentFailed(Exception):
    """A server or an answer does not fit the protocol; the text says what is wrong."""


@dataclass
class Answer:
    """A streamed completion. Seconds are counted from the request."""

    text: str
    tokens: int
    seconds: float
    first_token_s: float


@dataclass
class Model:
    """A model and its server."""

    label: str
    name: str
    port: int
    options: list[str]
    log: Path
    prompt: str
    expected: str | None = None
    process: "subprocess.Popen | None" = field(default=None, repr=False)
    started: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> float:
        """Start the server; returns the seconds from the process's start until it serves."""
        await self._port_is_free()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.name]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *self.options]
        with self.log.open("a") as log:
            self.started = time.perf_counter()
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},
                start_new_session=True,
            )
        async with httpx.AsyncClient(base_url=self.url, timeout=5, trust_env=False) as http:
            while time.perf_counter() - self.started < START_S:
                if self.process.poll() is not None:
                    raise ExperimentFailed(f"{self.name} did not start:\n{self._end_of_log()}")
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get("/health")).status_code == 200:
                        return time.perf_counter() - self.started
                await asyncio.sleep(POLL_S)
        raise ExperimentFailed(f"{self.name} was not up after {START_S:.0f} s; see {self.log}")

    async def _port_is_free(self) -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.close()
            raise ExperimentFailed(f"port {self.port} is in use; choose others with --port-a/-b")

    def _end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    async def complete(self, tokens: int) -> Answer:
        """The greedy, streamed completion of exactly ``tokens`` tokens."""
        body = {
            "model": self.name,
            "prompt": self.prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, first, usage = "", None, None
        started = time.perf_counter()
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=600, trust_env=False) as http,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                reason = (await answer.aread()).decode(errors="replace")
                raise ExperimentFailed(f"{self.url}: {answer.status_code} {reason}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk.get("choices"):
                    first = first or time.perf_counter() - started
                    text += chunk["choices"][0]["text"]
                usage = chunk.get("usage") or usage
        seconds = time.perf_counter() - started
        if first is None or usage is None or usage["completion_tokens"] != tokens:
            raise ExperimentFailed(f"{self.url}: the stream ended early: {usage}, {text!r}")
        return Answer(text, tokens, seconds, first)

    def host_bytes(self) -> int:
        """Private bytes of the server's processes, without a simulated device's memory."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.Error, OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                total += int(status.partition("RssAnon:")[2].split()[0]) * 1024
        return total

    def _processes(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []

    async def stop(self) -> None:
        """Stop the server and its processes, which may take a minute."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, 60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    async def memory(self) -> dict[str, Any]:
        """Bytes: ``device_used`` by all processes, ``weights_device`` and ``weights_backup`` by
        this server, ``host``. None if the server does not report it (stock vLLM)."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as http:
            answer = await http.get("/sleep_status")
        memory: dict[str, Any] = dict.fromkeys(("device_used", "weights_device", "weights_backup"))
        if answer.status_code == 200:
            ranks = answer.json()["ranks"]
            weights = [rank.get("tags", {}).get("weights", {}) for rank in ranks]
            memory = {
                "device_used": sum(rank["total"] - rank["free"] for rank in ranks),
                "weights_device": sum(w.get("device", 0) for w in weights),
                "weights_backup": sum(w.get("host", 0) for w in weights),
            }
        return {**memory, "host": self.host_bytes()}
