# SPDX-License-Identifier: Apache-2.0
"""A proxy that starts its servers by a models.yaml."""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from helpers import ROOT
from helpers.patience import patience, wait_for
from helpers.proxy import admin_client
from helpers.server import http_client
from vllm_sleep_ascend.proxy.launch import ports

MODULE = "vllm_sleep_ascend.proxy"
_MARK = "FLEET_OF_A_TEST"


class Fleet:
    """A proxy process with ``models`` and its own state, and the processes that it starts.

    At the end, all of them are killed.

    Args:
        before: code that the proxy's process runs first, such as for shorter limits.
    """

    def __init__(
        self,
        folder: Path,
        models: dict[str, Any],
        *options: str,
        before: str = "",
        **environment: str,
    ):
        self.folder, self.state = folder, folder / "state"
        self.file, self.journal = folder / "models.yaml", folder / "journal"
        self.journal.touch()
        self.log = folder / "proxy.log"
        self.write(models)
        self.port = ports.free(set())
        self.admin_port = ports.free({self.port})
        self.users = http_client(f"http://127.0.0.1:{self.port}")
        self.admin = admin_client(self.admin_port, environment)
        self._options = options
        run = f"from {MODULE} import __main__ as proxy\n{before}\nraise SystemExit(proxy.main())"
        self._program = ["-c", run] if before else ["-m", MODULE]
        self._environment = {**os.environ, **environment, _MARK: uuid.uuid4().hex}
        self.start()

    def write(self, models: dict[str, Any], **more: Any) -> None:
        self.file.write_text(yaml.safe_dump({"models": models, **more}, sort_keys=False))

    def stand_in(self, name: str, *options: str, **more: Any) -> dict[str, Any]:
        """An entry whose command is a stand-in for vLLM."""
        return {name: stand_in(self.folder, name, *options, **more)}

    def start(self) -> None:
        """Start the proxy, and wait until it serves."""
        where = ("--port", str(self.port), "--admin-port", str(self.admin_port))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *self._program, "--config", str(self.file), *where),
                    *("--state-dir", str(self.state), *self._options),
                ],
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        try:
            wait_for(self._is_up, "the proxy is up", 30)
        except BaseException:
            self.__exit__()
            raise

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return self.admin.get("/status").status_code == 200
        return False

    def ask(self, model: str, prompt: str = "x") -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
        return self.users.post("/v1/completions", json=body)

    def pid_of(self, model: str, prompt: str = "x") -> int:
        """Ask the model; the process that has answered."""
        answer = self.ask(model, prompt)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        return answer.json()["pid"]

    def status(self) -> dict[str, dict[str, Any]]:
        """By name; of two with the same one, that which stays."""
        servers = self.admin.get("/status").json()["servers"]
        return {s["name"]: s for s in sorted(servers, key=lambda s: -s["retiring"])}

    def states(self) -> dict[str, str]:
        return {name: server["state"] for name, server in self.status().items()}

    def metric(self, name: str) -> float:
        lines = self.admin.get("/metrics").text.splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith(f"sleep_proxy_{name}"))

    def events(self) -> list[str]:
        """Of the stand-ins' journal."""
        return self.journal.read_text().splitlines()

    def end(self, code: int = 0) -> None:
        """SIGTERM to the proxy, and wait until it has ended."""
        self.process.terminate()
        assert self.process.wait(60 * patience()) == code, self.log.read_text()

    def started(self) -> list[psutil.Process]:
        """All processes that this proxy or an earlier one has started, and that run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get(_MARK) == self._environment[_MARK]
                runs = process.status() != psutil.STATUS_ZOMBIE
                if is_ours and runs and process.pid != self.process.pid:
                    found.append(process)
        return found

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        while left := self.started():
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.02)
        self.users.close()
        self.admin.close()


def runs(pid: int) -> bool:
    """Whether the process has not ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def stand_in(folder: Path, name: str, *options: str, **more: Any) -> dict[str, Any]:
    program = str(ROOT / "tests" / "helpers" / "stand_in.py")
    journal = ("--journal", str(folder / "journal"))
    command = [sys.executable, program, "--port", "${PORT}", "--model", name, *journal, *options]
    return {"command": command, **more}
