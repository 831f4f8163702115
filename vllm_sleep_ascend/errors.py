# SPDX-License-Identifier: Apache-2.0
"""What can go wrong when memory sleeps and wakes."""

import torch


class SleepModeError(RuntimeError):
    """A sleep or a wake did not happen. The message says what was restored and what to do.

    Attributes:
        tag: the tag of the allocation at which it failed, ``""`` if at none.
        device: its device index, -1 if at none.
    """

    tag: str = ""
    device: int = -1


class AclError(SleepModeError):
    """An AscendCL call failed.

    Attributes:
        call: the function's name. code: its return code (see acl_base.h and the CANN error list).
        needed_bytes: the size that the call was about, 0 if none.
    """

    call: str = ""
    code: int = 0
    needed_bytes: int = 0


class DeviceOutOfMemoryError(SleepModeError, torch.OutOfMemoryError):
    """Device memory is short. ``free_bytes`` is device-wide: other processes move it."""

    needed_bytes: int = 0
    free_bytes: int = 0


class HostOutOfMemoryError(SleepModeError, MemoryError):
    """Host memory for the backup is short, or cannot be pinned."""

    needed_bytes: int = 0
    free_bytes: int = 0


class DiskError(SleepModeError):
    """The disk could not take or return a backup, or returned something else than was written.

    Attributes:
        needed_bytes: what the backup needs of the disk, 0 unless that is short of space.
        free_bytes: what the disk has left then.
    """

    needed_bytes: int = 0
    free_bytes: int = 0


class ImageError(SleepModeError):
    """An image was not saved, or is not one that this engine can start from.

    Attributes:
        needed_bytes: what the image needs of the disk, 0 unless that was short of space at first.
        free_bytes: what the disk has left then.
    """

    needed_bytes: int = 0
    free_bytes: int = 0


class ImageRefusedError(ImageError):
    """An image was not saved, because the engine or the directory does not admit one. Nothing was
    touched."""


class WeightsError(SleepModeError):
    """The weights in device memory are not, or not all, what they should be.

    Attributes:
        beyond_loading: other memory is damaged too, which loading the weights does not mend.
    """

    beyond_loading: bool = False


class RankGoneError(SleepModeError):
    """Another rank of the engine is gone or hangs. If it does not answer again, only a restart of
    the engine helps."""
