# SPDX-License-Identifier: Apache-2.0
"""The compiled allocator. Every call releases the GIL while it works; sizes are bytes.

Errors are those of ``vllm_sleep_ascend.errors``. As a shared library, this module exports the hooks
``camem_malloc`` and ``camem_free`` of torch's pluggable allocator.
"""

from typing import Literal, TypedDict

class Moved(TypedDict):
    offloaded: int
    unchanged: int
    discarded: int
    restored: int
    remapped: int
    moved: int  # backups that slept in the other place
    written: int  # to disk, where a kept file did not have it already

class Report(TypedDict):
    tags: dict[str, Moved]
    seconds: float

class AllocationInfo(TypedDict):
    address: int
    bytes: int
    device: int
    tag: str
    state: Literal["mapped", "offloaded", "discarded", "trimmed"]
    device_bytes: int
    host_bytes: int  # size of its backup in host memory
    page_locked_bytes: int  # the page-locked part of that
    disk_bytes: int  # size of its backup on disk
    asleep_in_host_bytes: int  # what sleeps, and whose backup is in host memory
    asleep_on_disk_bytes: int  # or on disk
    checksum: int | None  # of the backup's content, if one was given

class HostMemory(TypedDict):
    source: Literal["", "acl", "registered"]  # of page-locked memory; empty if not needed yet
    why: str
    locking_bytes_per_s: float  # of all threads together; 0 if not measured yet
    copying_bytes_per_s: float  # into plain memory that is touched for the first time
    prepared: int  # page-locked, for future backups
    staging: int  # page-locked, for copies of plain backups
    disk_staging: int  # page-locked, for copies of backups on disk
    why_not_direct: str  # what kept the last file from O_DIRECT, or empty
    steps: int  # calls of step_begins() so far
    failure: str  # why the last block could not be registered or page-locked, or empty

__file__: str  # type: ignore[no-redef]

def configure(
    *,
    chunk_bytes: int,
    keep_host_backup: bool,
    copy_threads: int,
    host_threads: int,
    host_memory: Literal["acl", "registered"] = "acl",
    why_host_memory: str = "",
    unprepared: Literal["measured", "lock", "stage"] = "measured",
    device_timeout_s: float = 60.0,
    scratch_chunk_bytes: int = 1 << 30,
    scratch_tags: list[str] = ...,
    place: Literal["host", "disk"] = "host",
    backup_dir: str = "",
    disk_blocks_bytes: int = 256 << 20,
) -> None:
    """Set the unit of later allocations, and how transfers work.

    ``host_threads`` allocate host memory and copy within it; ``copy_threads`` copy into existing
    memory. ``host_memory`` is the source of page-locked memory: "registered" is tried before it is
    used, and ``why_host_memory`` says why it is not even tried. ``unprepared`` is for a sleep
    without prepared memory: "lock" allocates page-locked memory, "stage" copies through a few
    page-locked blocks into plain memory, "measured" does what is faster on this host.
    ``scratch_tags`` are never copied, and are allocated in units of ``scratch_chunk_bytes``.
    ``place`` is where backups go if a sleep does not say. Those on disk are nameless files in
    ``backup_dir``, and are copied through page-locked blocks of ``disk_blocks_bytes`` together.
    """

def set_current_tag(name: str) -> str:
    """Set the tag of the calling thread's later allocations; returns the previous tag."""

def sleep(
    actions: dict[str, Literal["keep", "offload", "discard"]],
    otherwise: Literal["keep", "offload", "discard"] = "offload",
    checksums: dict[int, int] = ...,
    *,
    place: Literal["", "host", "disk"] = "",
    commit: bool = True,
) -> Report:
    """Apply its tag's action to every mapped allocation; ``otherwise`` is for other tags.

    ``checksums`` are those of contents, by address. An allocation whose kept backup has the same
    checksum is not copied. New backups keep their checksums.

    Memory that already sleeps is left unchanged, except that ``discard`` drops its backup, and that
    the backups of offloaded tags move to ``place``, if that is given. A file is kept for later
    sleeps while its allocations sleep in host memory. The caller has flushed torch's queues. If a
    call fails, everything is mapped again with its content, scratch tags possibly without, and
    backups lie where they did; the error says what could not be restored.

    Without ``commit`` it only prepares and returns an empty report; commit() or abort() follows.
    Any other sleep or wake rolls it back.
    """

def wake(tags: list[str], timeout_s: float = 0.0, *, commit: bool = True) -> Report:
    """Restore the sleeping allocations of these tags; wait up to ``timeout_s`` for device memory.
    If a call fails, all sleep as before and a retry is possible. ``commit`` is as in sleep()."""

def commit() -> Report:
    """Commit the prepared sleep or wake. No failing AscendCL call can make this fail.

    Raises:
        RuntimeError: nothing is prepared; another operation may have rolled it back.
    """

def abort() -> str:
    """Roll back what is prepared, if anything. Returns what failed in that, or ``""``."""

def prepare(tags: list[str], *, slowly: bool = False) -> None:
    """Page-lock memory for the backups of these tags in the background, and return at once.

    With ``slowly``, one thread does it, and pauses as long as it works.

    Raises:
        HostOutOfMemoryError: the host does not have enough memory. If other processes take it
            later, the preparation stops without an error, and the sleep that needs the memory
    reports it.
    """

def step_begins() -> None:
    """A step of the model begins. During steps, preparation pauses 50 times as long as it works."""

def step_ends() -> None:
    """A step has ended. Call it as often as ``step_begins``."""

def release_prepared() -> None:
    """Free, in the background, prepared memory that no sleep has used."""

def wait_prepared(timeout_s: float) -> bool:
    """Wait until ``prepare`` is done; False on a timeout."""

def copied_bytes() -> int:
    """Bytes that the current operation has copied so far. Does not wait for it."""

def wait_for_devices() -> None:
    """Wait for all work on the devices in use, in torch's contexts and the caller's.

    Raises:
        AclError: it has not completed after ``device_timeout_s``, or a stream captures a graph.
    """

def trim(addresses: set[int]) -> int:
    """Free the memory of segments that torch does not use, for good. Returns bytes."""

def distrust_backups(addresses: set[int]) -> None:
    """Make the next sleep copy these allocations again, even if their checksum is unchanged."""

def allocations() -> list[AllocationInfo]:
    """Every allocation, by address."""

def read_backup(address: int, bytes: int) -> bytes | None:
    """The content of sleeping memory, from its backup; None without one.

    Raises:
        DiskError: the backup is on disk, and cannot be read or is not what was written.
    """

def tags() -> list[str]:
    """Every tag that has been used."""

def available_host_bytes() -> int:
    """Bytes that the machine or this process's control group has left, whichever is less."""

def pinned_host_bytes() -> int:
    """This process's page-locked host memory: backups, prepared memory, staging."""

def plain_host_bytes() -> int:
    """Host memory of backups that is not page-locked."""

def host_memory() -> HostMemory:
    """Where host memory comes from. Waits for a running transaction."""

def component_bytes(device: int) -> dict[str, int] | None:
    """Device memory that this process holds, by component of CANN (``APP``, ``HCCL``, ``RUNTIME``
    and so on); None if AscendCL cannot tell."""
