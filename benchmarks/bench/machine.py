# SPDX-License-Identifier: Apache-2.0
"""The measured device, with one interface for CUDA, an NPU and the simulator."""

import os
import platform
import statistics
import subprocess
import time
from typing import Any

import torch

MIB = 1 << 20
GIB = 1 << 30


class Machine:
    """``name`` is "cuda", "npu" or "sim" (a simulated NPU)."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name != "cuda":
            import torch_npu  # noqa: F401
        self.torch: Any = torch.cuda if name == "cuda" else torch.npu
        self.device = torch.device("cuda" if name == "cuda" else "npu", 0)
        self.torch.set_device(0)

    def synchronize(self) -> None:
        self.torch.synchronize()

    def now(self) -> float:
        """The time in seconds, after all work on the device has completed."""
        self.synchronize()
        return time.perf_counter()

    def used(self) -> int:
        """Device bytes used by all processes, after freeing torch's cache."""
        self.synchronize()
        self.torch.empty_cache()
        free, total = self.torch.mem_get_info()
        return total - free

    def warm_up(self) -> None:
        """Load what this process will run on the device, so that it counts as context."""
        words = torch.empty((4096, 4096), dtype=torch.bfloat16, device=self.device)
        for tensor in (words, words[0]):
            tensor.view(torch.int16).random_(-3000, 3000)
            checksum(tensor)
        words.view(torch.uint8).fill_(1)
        self.synchronize()

    def link_peak(self, size: int, repeats: int = 5) -> dict[str, float]:
        """GB/s of a pinned copy in each direction, the link's peak."""
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.name != "sim")
        device = torch.ones(size, dtype=torch.uint8, device=self.device)
        peak = {}
        for direction, to, source in (("d2h", host, device), ("h2d", device, host)):
            rates = []
            for _ in range(repeats):
                start = self.now()
                to.copy_(source, non_blocking=True)
                rates.append(size / 1e9 / (self.now() - start))
            peak[direction] = max(rates)
        return peak

    @staticmethod
    def describe_host(name: str) -> dict[str, Any]:
        """The device, driver and host, without creating a context on the device."""
        host = {
            "cores": os.cpu_count(),
            "host_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        if name == "sim":
            return {"device": "simulated NPU (host memory)", **host}
        if name == "npu":
            return {"device": Machine("npu").torch.get_device_name(0), **host}
        query = "name,driver_version,pcie.link.gen.max,pcie.link.width.max"
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
        )
        fields = [field.strip() for field in (answer.stdout.strip() or "?,?,?,?").split(",")]
        link = f"PCIe Gen{fields[2]} x{fields[3]}"
        return {"device": fields[0], "driver": fields[1], "link": link, **host}


def checksum(tensor: torch.Tensor) -> int:
    # A sum needs 8 bytes per element besides the models of all ranks, so it is done in parts.
    parts = tensor.view(torch.int16).flatten().split(16 * MIB)
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)


def host_bytes() -> int:
    """This process's resident host memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
