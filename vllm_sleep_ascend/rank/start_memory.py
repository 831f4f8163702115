# SPDX-License-Identifier: Apache-2.0
"""Device memory while an engine starts.

Other processes may allocate and free device memory at any time. So this process's use is taken from
its own accounting, never from a difference of the device's free memory.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from vllm.logger import init_logger

from vllm_sleep_ascend.errors import DeviceOutOfMemoryError
from vllm_sleep_ascend.memory.account import held_bytes
from vllm_sleep_ascend.rank.host_worker import HostWorker

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30
_POLL_S = 0.01
_REMEDY = (
    "put the servers that share the device to sleep or end them, lower gpu_memory_utilization, or "
    "set wake_timeout_s to have the start wait for memory"
)


class StartMemory:
    """What an engine may use of its device: its share by ``gpu_memory_utilization``, minus what
    this process already holds, and never more than is free.

    Args:
        wait_s: seconds that each step waits for memory that another process may free.
    """

    def __init__(self, device: torch.device, utilization: float, wait_s: float) -> None:
        self._device = device
        self._utilization = utilization
        self._wait_s = wait_s
        self.share = math.ceil(self._free_and_total()[1] * utilization)

    def require(self) -> None:
        """Wait until the whole share is free or held.

        Raises:
            ValueError: other processes did not free it in time.
        """
        self._wait()
        free, total = self._free_and_total()
        needed = self._not_held()
        if free < needed:
            raise ValueError(
                f"device {self._device.index} has {free} bytes free and {needed} are needed to "
                f"start, by gpu_memory_utilization={self._utilization} of {total} bytes "
                f"({self._holders()}); {_REMEDY}"
            )

    def for_kv_cache(
        self,
        run_largest_batch: Callable[[], None],
        run_largest_graph: Callable[[], None],
        least: int,
    ) -> int:
        """Bytes for the KV cache, besides the temporary memory of the largest batch, and that of
        the largest batch that becomes a graph, which keeps it.

        Raises:
            DeviceOutOfMemoryError: other processes leave less than ``least``.
        """
        self._wait()
        batch, graph = self._peak_of(run_largest_batch), self._peak_of(run_largest_graph)
        self._wait()
        wanted = self._not_held() - batch - graph
        given = min(wanted, self._free_and_total()[0] - batch - graph)
        if given < least <= wanted:
            raise DeviceOutOfMemoryError(
                f"{max(0, given)} bytes of device memory are left for the KV cache, which needs "
                f"{least} and may have {wanted} ({self._holders()}); {_REMEDY}"
            )
        if given < wanted:
            logger.warning(
                "The KV cache gets %d bytes, and not the %d that gpu_memory_utilization=%s allows "
                "(%s). To change that, %s.",
                *(given, wanted, self._utilization, self._holders(), _REMEDY),
            )
        logger.info(
            "Available KV cache memory: %.2f GiB; this process holds %.2f GiB of device memory, "
            "graphs will keep about %.2f GiB, and a batch takes up to %.2f GiB for a moment.",
            *(n / _GIB for n in (given, held_bytes(self._device), graph, batch)),
        )
        return given

    @contextmanager
    def named(self, purpose: str) -> Iterator[None]:
        """Replace torch's error by one that says what the memory was for, who holds it, and what to
        do.

        Raises:
            DeviceOutOfMemoryError: instead of torch's error.
        """
        try:
            yield
        except DeviceOutOfMemoryError:
            raise
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemoryError(
                f"no device memory for {purpose} ({self._holders()}); {_REMEDY}. {error}"
            ) from error

    def waiting_allocations(self) -> TorchFunctionMode:
        """A context in which allocations wait for memory."""
        return _Waiting(self._wait_s)

    def _peak_of(self, run: Callable[[], None]) -> int:
        """The peak of torch's memory during the run, beyond what it holds afterwards."""
        gc.collect()
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(self._device)
        run()
        gc.collect()
        torch.accelerator.empty_cache()
        stats = torch.accelerator.memory_stats(self._device)
        return int(stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"])

    def _not_held(self) -> int:
        return self.share - held_bytes(self._device)

    def _wait(self) -> None:
        deadline = time.monotonic() + self._wait_s
        while self._free_and_total()[0] < self._not_held() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _free_and_total(self) -> tuple[int, int]:
        return torch.accelerator.get_memory_info(self._device)

    def _holders(self) -> str:
        free, total = self._free_and_total()
        held = held_bytes(self._device)
        return (
            f"device {self._device.index}: {free} bytes free, {held} held by this process, "
            f"{max(0, total - free - held)} by others"
        )


def least_kv_cache(worker: HostWorker) -> int:
    """Bytes of KV cache without which vLLM does not start this worker."""
    fits_itself = worker.model_config.original_max_model_len == -1
    if fits_itself or worker.cache_config.num_gpu_blocks_override is not None:
        return 1
    specs = worker.get_kv_cache_spec().values()
    return sum(spec.max_memory_usage_bytes(worker.vllm_config) for spec in specs)


class _Waiting(TorchFunctionMode):
    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self._wait_s = wait_s

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: Iterable[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return func(*args, **(kwargs or {}))
            except torch.OutOfMemoryError:
                # Any other function might have been interrupted half-way.
                if func not in (torch.empty, torch.zeros) or time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_S)
