# SPDX-License-Identifier: Apache-2.0
"""The simulated runtime calls of pyACL.

Addresses are integers. A call returns AscendCL's code, 0 for success; a call with results
returns them first and the code last.
"""

import ctypes

_library = ctypes.CDLL("libascendcl.so")
_pointer, _size, _kind = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def memcpy(dst: int, dest_max: int, src: int, count: int, kind: int) -> int:
    """Copy ``count`` bytes; ``kind`` 0 is on the host, 1 to the device, 2 back, 3 on the device."""
    return _library.aclrtMemcpy(
        _pointer(dst), _size(dest_max), _pointer(src), _size(count), _kind(kind)
    )


def memset(dev_ptr: int, max_count: int, value: int, count: int) -> int:
    """Set ``count`` bytes to ``value``."""
    return _library.aclrtMemset(
        _pointer(dev_ptr), _size(max_count), ctypes.c_int32(value), _size(count)
    )


def set_device(device_id: int) -> int:
    """The device that this thread uses."""
    return _library.aclrtSetDevice(ctypes.c_int32(device_id))


def get_device() -> tuple[int, int]:
    """This thread's device."""
    device = ctypes.c_int32()
    code = _library.aclrtGetDevice(ctypes.byref(device))
    return device.value, code


def synchronize_device() -> int:
    """Wait for everything under way on this thread's device."""
    return _library.aclrtSynchronizeDevice()


def get_mem_info(attr: int) -> tuple[int, int, int]:
    """Free and total bytes of the device's memory of this kind."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    code = _library.aclrtGetMemInfo(ctypes.c_int(attr), ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value, code
