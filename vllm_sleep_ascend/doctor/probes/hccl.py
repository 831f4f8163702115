# SPDX-License-Identifier: Apache-2.0
"""Whether HCCL frees the memory of a communicator (``release_communicators``)."""

import ctypes
from ctypes import byref, c_int, c_uint32, c_uint64, c_void_p
from typing import Any

from vllm_sleep_ascend.doctor.acl import AclError
from vllm_sleep_ascend.doctor.finding import Finding, degraded, not_probed, passed
from vllm_sleep_ascend.doctor.probes.base import Device, a_stream
from vllm_sleep_ascend.doctor.sizes import MIB, mib

_ROOT_INFO_BYTES, _FP32, _SUM = 4108, 4, 0
_ELEMENTS = 1024
_VISIBLE = MIB  # less than this may be noise


def communicator(device: Device) -> Finding:
    try:
        hccl = ctypes.CDLL("libhccl.so")
    except OSError as error:
        remedy = "Engines with several ranks need it: install all of CANN."
        return not_probed(f"HCCL cannot be loaded: {error}", remedy)

    def call(name: str, *arguments: Any) -> None:
        code = getattr(hccl, name)(*arguments)
        if code != 0:
            raise AclError(name, code)

    root, handle = ctypes.create_string_buffer(_ROOT_INFO_BYTES), c_void_p()
    with device.memory(device.unit) as address, a_stream(device.acl) as stream:
        device.write(address, 1, device.unit)
        before = _held(device)
        call("HcclGetRootInfo", root)
        call("HcclCommInitRootInfo", c_uint32(1), root, c_uint32(0), byref(handle))
        try:
            buffer, count = c_void_p(address), c_uint64(_ELEMENTS)
            types = c_int(_FP32), c_int(_SUM)
            call("HcclAllReduce", buffer, buffer, count, *types, handle, c_void_p(stream))
            device.acl.synchronize(stream)
            during = _held(device)
        finally:
            call("HcclCommDestroy", handle)
        after = _held(device)
    took, kept = during - before, after - before
    figures = {"held_bytes": took, "kept_bytes": kept}
    if took < _VISIBLE:
        return not_probed(
            "a communicator with one rank used no visible memory, so it is not known whether HCCL "
            "frees memory",
            "To use release_communicators, start an engine with two ranks: its first sleep reports "
            "whether HCCL kept the memory.",
            **figures,
        )
    if kept > max(0.1 * took, device.unit):
        return degraded(
            f"{mib(kept)} of {mib(took)} were kept when it was destroyed",
            "release_communicators does not free all memory of communicators.",
            "See HCCL's log, or leave out release_communicators.",
            **figures,
        )
    return passed(f"a communicator with one rank used {mib(took)} and freed them", **figures)


def _held(device: Device) -> int:
    """From CANN's accounting, or from the device's free memory, which other processes change."""
    components = device.acl.component_bytes(device.index)
    if components is not None and "HCCL" in components:
        return components["HCCL"]
    free, total = device.acl.free_and_total()
    return total - free
