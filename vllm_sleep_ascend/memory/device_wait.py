# SPDX-License-Identifier: Apache-2.0
"""Waiting for the device, with a limit: torch's own wait has none."""

import torch
import torch_npu

_SYNC_TIMEOUT = 507046  # ACL_ERROR_RT_STREAM_SYNC_TIMEOUT


def wait_for_device() -> None:
    """Wait for all work that torch has queued or anything has launched.

    torch first launches its queue, which has no limit: a launch blocks if a stream is full.

    Raises:
        AclError: it has not completed after ``device_timeout_s`` (``is_running``), or a stream
            captures a graph. Nothing was touched.
    """
    from vllm_sleep_ascend import _camem  # missing in an installation without sleep mode

    torch_npu.npu.current_stream().npu_stream  # noqa: B018  torch launches all of its queue first
    _camem.wait_for_devices()
    torch.accelerator.synchronize()  # at once; raises what failed in torch's queue


def is_running(error: Exception) -> bool:
    """Whether a wait failed with this error because work on the device was still running."""
    return getattr(error, "code", 0) == _SYNC_TIMEOUT
