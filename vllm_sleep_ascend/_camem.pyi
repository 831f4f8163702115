# SPDX-License-Identifier: Apache-2.0
"""The compiled allocator. Every call releases the GIL while it works; sizes are bytes.

Errors are those of ``vllm_sleep_ascend.errors``. Loading this module as a shared library gives the
hooks ``camem_malloc`` and ``camem_free`` of torch's pluggable allocator.
"""

from typing import Literal, TypedDict

class Moved(TypedDict):
    offloaded: int
    unchanged: int
    discarded: int
    restored: int
    remapped: int

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
    host_bytes: int  # of its backup
    page_locked_bytes: int  # of those
    checksum: int | None  # of the content in the backup, if one was given

class HostMemory(TypedDict):
    source: Literal["", "acl", "registered"]  # of page-locked memory; empty: not needed yet
    why: str
    locking_bytes_per_s: float  # of all threads together; 0: not measured yet
    copying_bytes_per_s: float  # into plain memory that is touched for the first time
    prepared: int  # page-locked, for backups to come
    staging: int  # page-locked, through which copies of plain backups go
    steps: int  # that step_begins() told of so far
    failure: str  # what kept the last block from being registered or page-locked, or empty

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
) -> None:
    """Set the unit of later allocations, and how transfers work. ``host_threads`` take host memory
    and copy in it; ``copy_threads`` copy once it is there. ``host_memory``: where page-locked
    memory comes from; "registered" is tried before it is used, and ``why_host_memory`` is why it
    is not even tried. ``unprepared``: whether a sleep for which no memory is ready takes it, or
    goes through a few page-locked blocks into plain memory; "measured": what is faster on this
    host. ``scratch_tags``, of which nothing is ever copied, are allocated in units of
    ``scratch_chunk_bytes``."""

def set_current_tag(name: str) -> str:
    """Tag later allocations of the calling thread; returns the tag before."""

def sleep(
    actions: dict[str, Literal["keep", "offload", "discard"]],
    otherwise: Literal["keep", "offload", "discard"] = "offload",
    checksums: dict[int, int] = ...,
    *,
    commit: bool = True,
) -> Report:
    """Do to every mapped allocation what its tag's action says; ``otherwise`` is for other tags.

    ``checksums`` are of contents, by address: what has the checksum of its kept backup is not
    copied, and the others are remembered with the new backups.

    What sleeps already stays as it is, except that ``discard`` drops its host backup. The caller
    has synchronised torch's own queues. If a call fails, all is mapped again with its content,
    that of scratch tags perhaps without; the error says what could not be.

    Without ``commit``: do all that can fail, keep all that is needed to take it back, and return
    an empty report; commit() or abort() follows. Any other sleep or wake takes it back.
    """

def wake(tags: list[str], timeout_s: float = 0.0, *, commit: bool = True) -> Report:
    """Bring back the sleeping allocations of these tags, waiting up to ``timeout_s`` for device
    memory. If a call fails, all sleeps as before and the same wake can be repeated. ``commit`` as
    in sleep()."""

def commit() -> Report:
    """Carry out the sleep or wake that was prepared. No AscendCL call can make this fail.

    Raises:
        RuntimeError: nothing is prepared; another operation may have taken it back.
    """

def abort() -> str:
    """Take back what is prepared, if anything is. Returns what failed in that, ``""``: nothing."""

def prepare(tags: list[str], *, slowly: bool = False) -> None:
    """Take page-locked memory for the backups of these tags in the background, and return at once;
    ``slowly`` with one thread that rests as long as it works.

    Raises:
        HostOutOfMemoryError: the host has not that much. What others take while it works ends it
            early, without an error: the sleep that needs the memory asks again.
    """

def step_begins() -> None:
    """A step of the model begins: while steps run, a thread that prepares rests fifty times as long
    as it works."""

def step_ends() -> None:
    """A step has ended. To be called as often as ``step_begins``."""

def release_prepared() -> None:
    """Give back, in the background, what ``prepare`` took and no sleep has used."""

def wait_prepared(timeout_s: float) -> bool:
    """Wait until ``prepare`` is done; False if it takes longer."""

def copied_bytes() -> int:
    """Bytes that the current operation has copied so far. Does not wait for it."""

def wait_for_devices() -> None:
    """Wait for all that was launched on the devices in use, in torch's contexts and the caller's.

    Raises:
        AclError: it has not ended after ``device_timeout_s``, or a stream captures a graph.
    """

def trim(addresses: set[int]) -> int:
    """Give back for good the memory of segments that torch does not use. Returns bytes."""

def distrust_backups(addresses: set[int]) -> None:
    """Let the next sleep copy these allocations again, also where their checksum did not change."""

def allocations() -> list[AllocationInfo]:
    """Every allocation, by address."""

def read_backup(address: int, bytes: int) -> bytes | None:
    """The content of sleeping memory, from its host backup; None if it is not in one."""

def tags() -> list[str]:
    """Every tag that was ever named."""

def available_host_bytes() -> int:
    """What the machine, or this process's control group, has left."""

def pinned_host_bytes() -> int:
    """Page-locked host memory that this process holds: backups, prepared memory, staging."""

def plain_host_bytes() -> int:
    """Host memory of backups that is not page-locked."""

def host_memory() -> HostMemory:
    """Where host memory comes from. Waits for a transaction that is under way."""

def component_bytes(device: int) -> dict[str, int] | None:
    """Device memory that this process holds, by component of CANN (``APP``, ``HCCL``, ``RUNTIME``
    and so on); None where AscendCL cannot tell."""
