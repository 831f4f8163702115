# SPDX-License-Identifier: Apache-2.0
"""torch's work on this process's device that hangs until it is released."""

import torch

from helpers import MIB
from vllm_sleep_ascend.sim import control


class StuckCopy:
    """A copy to the device, in the order of the current stream."""

    def __init__(self) -> None:
        self._source = torch.ones(MIB).pin_memory()
        self._target = torch.zeros(MIB, device="npu")
        torch.npu.synchronize()

    def launch(self) -> None:
        control.set_faults("aclrtMemcpyAsync.work:1:delay_ms=3600000")  # or until let_go()
        self._target.copy_(self._source, non_blocking=True)

    def has_arrived(self) -> bool:
        return torch.equal(self._target.cpu(), self._source)


def let_go() -> None:
    """Release the stuck work, and wait for it."""
    control.set_faults("")
    torch.npu.synchronize()
