# SPDX-License-Identifier: Apache-2.0
"""What a process holds of its device besides memory that can sleep, by cause."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from vllm_sleep_ascend.policy import GRAPHS

if TYPE_CHECKING:
    from vllm_sleep_ascend.status import TagUsage

_APPLICATION, _HCCL = "APP", "HCCL"  # components in AscendCL's account
_MIB = 1 << 20


def resident_bytes(device: torch.device, tags: Mapping[str, "TagUsage"]) -> dict[str, int]:
    """Bytes of device memory of this process, by cause; those of other processes do not count.

    ``communicators``: HCCL's. ``context``: the runtime and other components of CANN. ``graphs``:
    mapped memory of captured graphs. ``other``: what the process has allocated outside sleep mode,
    such as torch's small tensors outside the pools. All but ``graphs`` are from AscendCL's
    accounting (aclrtGetMemUsageInfo), and missing without it.

    Args:
        tags: CamemBackend.usage().
    """
    from vllm_sleep_ascend import _camem

    graphs = {"graphs": tags[GRAPHS]["device"] if GRAPHS in tags else 0}
    components = _camem.component_bytes(device.index)
    if components is None:
        return graphs
    communicators = components.pop(_HCCL, 0)
    managed = sum(tag["device"] for tag in tags.values())
    other = max(0, components.pop(_APPLICATION, 0) - managed)
    context = sum(components.values())
    return {"context": context, "communicators": communicators, **graphs, "other": other}


def held_bytes(device: torch.device) -> int:
    """Device bytes of this process, independent of other processes: from AscendCL's accounting, and
    at least torch's allocations that are not asleep."""
    by_torch = torch.accelerator.memory_reserved(device)
    try:
        from vllm_sleep_ascend import _camem
    except ImportError:  # installed without the compiled allocator: nothing sleeps
        return by_torch
    asleep = sum(
        a["bytes"] - a["device_bytes"] for a in _camem.allocations() if a["device"] == device.index
    )
    components = _camem.component_bytes(device.index) or {}
    return max(sum(components.values()), by_torch - asleep)


def communicator_bytes(device: torch.device) -> int | None:
    """Bytes of device memory that HCCL holds in this process; None where AscendCL cannot tell."""
    from vllm_sleep_ascend import _camem

    components = _camem.component_bytes(device.index)
    return None if components is None else components.get(_HCCL, 0)


def describe(resident: Mapping[str, int]) -> str:
    """The figures in MiB, for a log."""
    return ", ".join(f"{cause} {count / _MIB:.0f} MiB" for cause, count in resident.items())
