# SPDX-License-Identifier: Apache-2.0
"""The probes, in the order in which they run."""

from vllm_sleep_ascend.doctor.acl import OUT_OF_MEMORY, AclError
from vllm_sleep_ascend.doctor.finding import Finding, failed, of_call
from vllm_sleep_ascend.doctor.probes import device_memory, hccl, host_memory, sleep, streams
from vllm_sleep_ascend.doctor.probes.base import Device, Probe

_MAPS, _LOCKS = ("map_at_offset",), ("page_locked",)
_ALL = ("map_again", "plain_copies", *_LOCKS)

PROBES = (
    Probe("map_at_offset", "mapped at an offset", device_memory.at_an_offset),
    Probe("map_again", "mapped again", device_memory.mapped_again, needs=_MAPS),
    Probe("comes_free", "memory comes free", device_memory.comes_free, needs=_MAPS),
    Probe("plain_copies", "plain host memory", host_memory.plain_copies, needs=_MAPS),
    Probe("page_locked", "page-locked memory", host_memory.page_locked, needs=_MAPS),
    Probe("registered", "registered memory", host_memory.registered, needs=_MAPS, extra=True),
    Probe("page_locking", "page-locking speed", host_memory.page_locking, needs=_LOCKS),
    Probe("streams", "streams", streams.streams),
    Probe("deadlines", "waits with a deadline", streams.deadlines, needs=_LOCKS),
    Probe("speeds", "speed of copies", streams.speeds, deadline_s=15, needs=_LOCKS),
    Probe("sleep_and_wake", "sleep and wake", sleep.sleep_and_wake, deadline_s=30, needs=_ALL),
    Probe("communicator", "communicator", hccl.communicator, needs=_MAPS, extra=True),
)


def run(probe: Probe, device: Device) -> Finding:
    """Run the probe; a failed call becomes a finding."""
    try:
        return probe.run(device)
    except Exception as error:
        return _failed_call(_first(error))


def _first(error: BaseException) -> BaseException:
    """The first failure, because cleaning up after it may have failed too."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _failed_call(error: BaseException) -> Finding:
    figures = of_call(error)
    remedy = (
        "Free memory of the device or the host, or name less with --gib."
        if figures.get("code") in OUT_OF_MEMORY
        else "Look the code up in CANN's list of errors; see npu-smi info, dmesg and CANN's log."
    )
    found = str(error) if isinstance(error, AclError) else f"{type(error).__name__}: {error}"
    return failed(found, "Sleep mode rests on it.", remedy, **figures)
