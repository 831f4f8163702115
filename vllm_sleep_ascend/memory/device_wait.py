# SPDX-License-Identifier: Apache-2.0
"""Waiting for the device, with a limit: torch's own wait has none."""

import torch
import torch_npu


def wait_for_device() -> None:
    """Wait for all that torch has queued, and for all that anybody has launched.

    Raises:
        AclError: it has not ended after ``device_timeout_s``. Nothing was touched.
    """
    from vllm_sleep_ascend import _camem  # not there in an installation without sleep mode

    torch_npu.npu.current_stream().npu_stream  # noqa: B018  torch launches all of its queue first
    _camem.wait_for_devices()
    torch.accelerator.synchronize()  # at once; raises what failed in torch's queue
