# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on this machine, each with its own simulated NPU.

Each node is a raylet with its own simulated machine and, if the system allows it, its own network
namespace, so that only a pair of virtual network interfaces connects the two.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.patience import deadline
from helpers.server import free_ports

BIN = Path(sys.executable).parent
INTERFACE = "eth0"


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, timeout=30)


class Network:
    """Two network namespaces with a link, or the host's own network for both nodes."""

    def __init__(self) -> None:
        self.names = [f"npu-{os.getpid()}-{node}" for node in range(2)]
        try:
            self._connect()
            self.separate = True
        except (OSError, subprocess.SubprocessError):
            self.close()
            self.separate = False

    def _connect(self) -> None:
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        ends = ("netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        _ip("link", "add", INTERFACE, *ends)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("netns", "exec", name, "true")

    addresses = ("10.231.7.1", "10.231.7.2")

    def on(self, node: int) -> list[str]:
        """The prefix of a command that runs on a node."""
        return ["ip", "netns", "exec", self.names[node]] if self.separate else []

    def close(self) -> None:
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _ip("netns", "delete", name)


# The first node has two devices and its raylet gets the second one; the second node has one.
DEVICES: tuple[dict[str, str], ...] = (
    {"NPU_SIM_DEVICES": "2", "ASCEND_RT_VISIBLE_DEVICES": "1"},
    {"NPU_SIM_DEVICES": "1"},
)


class RayCluster:
    """The two nodes, as a context manager."""

    def __init__(self, environment: dict[str, str]) -> None:
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ray["RAY_worker_niceness"] = "0"  # otherwise workers wait for everything else
        self._environment = {**os.environ, **ray, **environment}
        self._environment.pop("PYTEST_XDIST_WORKER", None)  # of a node's tests, its own machine
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # socket names are short
        self.network = Network()
        self._processes: list[subprocess.Popen] = []
        head = self.network.addresses[0] if self.network.separate else "127.0.0.1"
        (port,) = free_ports(1)
        self.address = f"{head}:{port}"
        try:
            head_only = ("--head", f"--port={port}", "--include-dashboard=false")
            self._start(0, *head_only, f"--temp-dir={self.folder}")
            self._start(1, f"--address={self.address}")
        except BaseException:
            self.close()
            raise

    def environment(self, node: int) -> dict[str, str]:
        """The environment of processes on a node."""
        own = {"NPU_SIM_MACHINE": f"ray-{node}-{os.getpid()}", **DEVICES[node]}
        if self.network.separate:
            own.update(HCCL_SOCKET_IFNAME=INTERFACE, GLOO_SOCKET_IFNAME=INTERFACE)
        return {**self._environment, **own, "RAY_ADDRESS": self.address}

    def _start(self, node: int, *options: str, attempts: int = 3) -> None:
        """Start a node. Ray waits only 30 s for its own parts, so retry on a busy machine."""
        separate = self.network.separate
        address = [f"--node-ip-address={self.network.addresses[node]}"] if separate else []
        command = [
            *(*self.network.on(node), BIN / "ray", "start", "--block", "--num-cpus=1"),
            *("--resources", json.dumps({"NPU": 1}), f"--object-store-memory={80 << 20}"),
            *("--disable-usage-stats", *options, *address),
        ]
        log = self.folder / f"node-{node}.log"
        environment = self.environment(node)
        del environment["RAY_ADDRESS"]
        with log.open("w") as out:
            self._processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=out, stderr=out, start_new_session=True
                )
            )
        end = deadline(60)
        while "Ray runtime started" not in log.read_text():
            if self._processes[-1].poll() is not None and attempts > 1:
                self._start(node, *options, attempts=attempts - 1)
                return
            if self._processes[-1].poll() is not None or time.monotonic() > end:
                raise AssertionError(f"node {node} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)

    def run(
        self, node: int, command: list, timeout: float, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run a command on a node."""
        return subprocess.run(
            [*self.network.on(node), *command],
            env={**self.environment(node), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()  # ray stops what it started
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
