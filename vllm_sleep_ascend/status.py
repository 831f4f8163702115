# SPDX-License-Identifier: Apache-2.0
"""What a rank says of itself, and what an engine's state and level are by that.

Ranks answer ``collective_rpc("sleep_status")`` with it, servers ``GET /sleep_status``. Read by
metrics, clients and the proxy; imports no vLLM.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from vllm_sleep_ascend.policy import DEFERRABLE_TAGS

if TYPE_CHECKING:
    from vllm_sleep_ascend._camem import Moved

State = Literal["awake", "paused", "partly_asleep", "asleep", "awake_without_weights"]


class TagUsage(TypedDict):
    """Bytes of one tag's allocations: awake, or asleep with or without their content; memory that
    they hold now; where the backups of those asleep lie; and how many they are."""

    mapped: int
    offloaded: int
    discarded: int
    device: int
    host: int
    page_locked: int  # of ``host``
    disk: int
    asleep_in_host: int
    asleep_on_disk: int
    allocations: int


class DraftOrigin(TypedDict):
    source: str
    path: str | None


class WeightsOrigin(TypedDict):
    """Where the weights came from (``rank.weights.source.Kind``), and their version in vLLM. The
    path is that of a checkpoint or an image, else None."""

    source: str
    path: str | None
    version: str
    draft: NotRequired[DraftOrigin]


class WeightsReport(TypedDict):
    """What a rank says of its weights (``collective_rpc("weights_content")``).

    ``missing``: parameters, or shards of them, without content; ``corrupt``: whether that was found
    out by comparing; ``beyond_loading``: whether more was found than loading mends; ``updating``:
    whether an update is under way; ``version``: vLLM's, of what was loaded last.
    """

    missing: list[str]
    corrupt: bool
    beyond_loading: bool
    updating: bool
    version: str


class HostMemoryStatus(TypedDict):
    """Where page-locked memory comes from, and bytes of it that no backup has yet: see
    ``_camem.HostMemory``. ``needed`` is what a sleep at level 1 takes of the ``available`` bytes of
    the machine, or of the process's control group."""

    needed: int
    available: int
    source: str
    why: str
    prepared: int
    staging: int
    failure: str


class DiskBackupStatus(TypedDict):
    """Backups on disk: where they lie, their bytes, bytes of the page-locked blocks for their
    copies, and what kept the last file from O_DIRECT (``""``: nothing)."""

    directory: str
    bytes: int
    blocks: int
    why_not_direct: str


class BackupPlaces(TypedDict):
    """Bytes that sleep, by where their backup lies."""

    host: int
    disk: int


class LastOperation(TypedDict):
    """``tags`` has bytes by what became of them; ``copied_bytes`` are those that took the link."""

    operation: str
    tags: "dict[str, Moved]"
    seconds: float
    copied_bytes: int
    copied_gb_per_s: float


class LastError(TypedDict):
    operation: str
    type: str
    message: str


class RankStatus(TypedDict):
    """One rank. ``free`` and ``total`` are bytes of its device, whoever holds them; ``held`` are
    those of its process, and ``share`` is what it may use awake, by gpu_memory_utilization. What
    comes after ``enabled`` is there with sleep mode alone."""

    rank: int
    engine: int  # of those that are data parallel
    device: int
    free: int
    total: int
    held: int
    share: int
    enabled: bool
    state: NotRequired[str]  # of vLLM's SleepModeBackend
    tags: NotRequired[dict[str, TagUsage]]
    resident: NotRequired[dict[str, int]]  # account.resident_bytes()
    host_backup: NotRequired[int]
    backups: NotRequired[BackupPlaces]
    host_memory: NotRequired[HostMemoryStatus]
    disk_backup: NotRequired[DiskBackupStatus | None]  # None without backup_dir
    parameters_without_content: NotRequired[int]
    weights: NotRequired[WeightsOrigin]
    last_operation: NotRequired[LastOperation | None]
    last_error: NotRequired[LastError | None]


def state_of(ranks: Sequence[RankStatus], is_sleeping: bool) -> State:
    """The state of the engine, or engines, of these ranks.

    Args:
        is_sleeping: what vLLM says; it counts a pause (level 0, ``/pause``) as sleep.
    """
    usages = [usage for rank in ranks for tag in DEFERRABLE_TAGS if (usage := _usage(rank, tag))]
    # A model without a KV cache, such as an encoder, has no such tag.
    asleep = [usage["offloaded"] + usage["discarded"] > 0 for usage in usages]
    if any(asleep):
        return "asleep" if all(asleep) else "partly_asleep"
    if _without_content(ranks):
        return "awake_without_weights"
    return "paused" if is_sleeping else "awake"


def level_of(ranks: Sequence[RankStatus]) -> int:
    """The level at which the weights sleep; 0 if they are awake.

    Weights that level 2 discarded and nobody has loaded since count as 2, awake or not.
    """
    weights = [usage for rank in ranks if (usage := _usage(rank, "weights"))]
    if _without_content(ranks) or any(usage["discarded"] for usage in weights):
        return 2
    return 1 if any(usage["offloaded"] for usage in weights) else 0


def in_no_checkpoint(origin: WeightsOrigin) -> str | None:
    """What level 2 discards and no checkpoint or image brings back, in words; None: nothing."""
    if origin["source"] not in ("checkpoint", "image"):
        return f"the weights (source: {origin['source']}, version: {origin['version']})"
    return None


def _usage(rank: RankStatus, tag: str) -> TagUsage | None:
    return rank.get("tags", {}).get(tag)


def _without_content(ranks: Sequence[RankStatus]) -> bool:
    return any(rank.get("parameters_without_content") for rank in ranks)
