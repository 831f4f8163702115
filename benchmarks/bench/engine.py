# SPDX-License-Identifier: Apache-2.0
"""A benchmark's child processes."""

import json
import subprocess
import sys
from typing import Any


class Engine:
    """A child process with one model, which executes commands, one per line."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        """Run the current script with the same arguments and ``--child name``."""
        command = [sys.executable, *sys.argv, "--child", name]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # otherwise a library has printed it
                return json.loads(line)
        raise SystemExit(f"an engine ended with {self._process.wait()}")

    def do(self, command: str) -> dict[str, Any]:
        self.tell(command)
        return self.answer()

    def close(self) -> None:
        self._process.communicate()
