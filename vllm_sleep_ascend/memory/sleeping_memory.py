# SPDX-License-Identifier: Apache-2.0
"""This process's allocations that can sleep, on top of the compiled allocator. Needs no vLLM."""

import gc
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.errors import SleepModeError, WeightsError
from vllm_sleep_ascend.memory import PROGRAM, pool
from vllm_sleep_ascend.memory.checksum import checksums
from vllm_sleep_ascend.memory.content import SleepingContent, current_device, holds
from vllm_sleep_ascend.memory.device_wait import wait_for_device
from vllm_sleep_ascend.memory.host import page_locked_source
from vllm_sleep_ascend.memory.progress import logged
from vllm_sleep_ascend.policy import POLICY, SCRATCH_TAGS, Action, Place
from vllm_sleep_ascend.status import DiskBackupStatus, HostMemoryStatus, LastOperation, TagUsage

# A child of vLLM's logger, so that its handlers and level apply where it is.
logger = logging.getLogger(f"vllm.{__name__}")

_GIB = 1 << 30
_ASLEEP = ("offloaded", "discarded")


class SleepingMemory(SleepingContent):
    """Frees and restores the memory of this process's allocations. Each operation is a transaction:
    it happens, or it is rolled back and the error says why."""

    _configured: ClassVar[bool] = False  # the process's allocator

    def __init__(self) -> None:
        super().__init__()
        self.last_operation: LastOperation | None = None
        # With several ranks an operation is only prepared, until commit() or abort().
        self.commits_at_once = True
        self._prepared = ""
        self._place: Place | None = None  # that the sleep names which is prepared
        self._host_memory_logged = ""
        self._page_cache_logged = ""
        self._config = SleepModeConfig()
        if not SleepingMemory._configured:
            self.configure(self._config)

    def configure(self, config: SleepModeConfig) -> None:
        """Set the engine's options, before its first allocation.

        Raises:
            ValueError: ``backup_dir`` is no directory in which files can be created.
        """
        config.check_backup_dir()
        SleepingMemory._configured = True
        self._config = config
        source, why = page_locked_source(config.host_memory)
        _camem.configure(
            chunk_bytes=config.chunk_mib << 20,
            keep_host_backup=config.keep_host_backup,
            copy_threads=3,
            host_threads=16,
            host_memory=source,
            why_host_memory=why,
            device_timeout_s=config.device_timeout_s,
            scratch_tags=list(SCRATCH_TAGS),
            place=config.place,
            backup_dir=config.backup_dir or "",
            disk_blocks_bytes=config.disk_blocks_mib << 20,
        )

    def check_place(self, place: Place | None) -> None:
        """
        Raises:
            ValueError: backups cannot go there.
        """
        self._config.check_place(place)

    def verifies(self, place: Place | None) -> bool:
        """Whether a wake from there verifies the content against checksums, and may find it
        changed."""
        return self._config.verify_wake or (place or self._config.place) == "disk"

    @property
    def reloads_after_level_2(self) -> bool:
        """Whether a wake loads the weights that level 2 discarded."""
        return self._config.after_level2 == "reload"

    @contextmanager
    def step(self) -> Iterator[None]:
        """The model runs a step inside, during which background preparation slows down."""
        _camem.step_begins()
        try:
            yield
        finally:
            _camem.step_ends()

    def prepare(self, ranks: int = 1) -> None:
        """Take page-locked memory for the weights in the background, as ``host_backup`` says.
        ``ranks`` of them share the host. A sleep that needs more than it has says so when it comes.
        """
        when, by_itself = self._config.host_backup, self._config.host_backup == "auto"
        if when in ("on_demand", "disk") or (by_itself and not self._config.keep_host_backup):
            return
        needed, available = self.host_need({"weights": "offload"}, "keep")
        if by_itself and available < 2 * ranks * needed:
            logger.info(
                "camem: no host memory is prepared: the host has %.2f GiB, and twice what %d ranks "
                "need are %.2f GiB. The first sleep takes it (host_backup)",
                available / _GIB,
                ranks,
                2 * ranks * needed / _GIB,
            )
            return
        try:
            _camem.prepare(["weights"], slowly=by_itself)
        except SleepModeError as error:
            logger.warning("camem: no host memory was prepared (host_backup): %s", error)
            return
        logger.info("camem: preparing %.2f GiB of page-locked host memory", needed / _GIB)
        self._log_host_memory()

    def _log_host_memory(self) -> None:
        """Once, as soon as it is known, and again if memory can no longer be registered."""
        memory = _camem.host_memory()
        before, source = self._host_memory_logged, memory["source"]
        if source in ("", before):
            return
        self._host_memory_logged = source
        unmet = "registered" in (before, self._config.host_memory) and source != "registered"
        logger.log(
            logging.WARNING if unmet else logging.INFO,
            "camem: page-locked host memory is %s: %s",
            "registered" if source == "registered" else "that of aclrtMallocHost",
            memory["why"],
        )

    def _log_page_cache(self) -> None:
        """Once for each reason, as soon as it is known."""
        why = _camem.host_memory()["why_not_direct"]
        if why and why != self._page_cache_logged:
            self._page_cache_logged = why
            logger.warning(
                "camem: backups on disk go through the page cache, which may be slower: %s", why
            )

    def wake_what_was_left(self) -> None:
        """Wake what an engine of this process left asleep when it ended. Something refers to it,
        such as a constant of a library that was first imported while a model was built.

        Raises:
            SleepModeError: it could not wake, and is as it was.
        """
        tags = self.tags()
        left = [a for a in _camem.allocations() if a["state"] in _ASLEEP and a["tag"] in tags]
        if left:
            total = sum(a["bytes"] for a in left)
            logger.info(
                "camem: %d bytes that an ended engine left asleep are still in use: they wake",
                total,
            )
            try:
                self.wake(tags)
            except SleepModeError as error:
                error.args = (
                    f"{total} bytes that an ended engine left asleep are still in use, and could "
                    f"not wake: {error} Drop what refers to them, or start a new process",
                )
                raise
        discarded = [a for a in left if a["state"] == "discarded"]
        for address, content in self.saved or ():
            if any(holds(a, address) for a in discarded):
                self.write(address, content)
        self.saved = None

    def wake(self, tags: list[str]) -> None:
        """Restore only these tags."""
        gc.collect()
        wait_for_device()  # as torch does next, without a limit
        torch.accelerator.empty_cache()
        asleep = {a["address"] for a in _camem.allocations() if a["state"] == "offloaded"}
        with logged("wake"):
            report = _camem.wake(tags, self._config.wake_timeout_s, commit=self.commits_at_once)
        if self._config.verify_wake:
            self._verify(asleep)
        self._prepared = "wake"
        if self.commits_at_once:
            self._finish(report)

    def commit(self) -> None:
        """Commit what is prepared, if anything. Cannot fail."""
        if self._prepared:
            self._finish(_camem.commit())

    def abort(self) -> str:
        """Roll back what is prepared, if anything; returns what failed, or ``""``."""
        self._prepared, self._place = "", None
        return _camem.abort()

    def asleep(self, tag: str) -> bool:
        """Whether memory of this tag is unmapped."""
        return not self.states(tag).isdisjoint(_ASLEEP)

    def states(self, tag: str) -> set[str]:
        """The states of this tag's allocations; see ``_camem.AllocationInfo``."""
        return {a["state"] for a in _camem.allocations() if a["tag"] == tag}

    def tags(self) -> list[str]:
        """Every tag that has been used, except those of a program's own regions."""
        return [tag for tag in _camem.tags() if not tag.startswith(PROGRAM)]

    def usage(self) -> dict[str, TagUsage]:
        """The state and the bytes of allocations, by tag."""
        tags: dict[str, TagUsage] = {}
        for allocation in _camem.allocations():
            if allocation["state"] == "trimmed":
                continue
            usage = tags.setdefault(
                allocation["tag"],
                {
                    "mapped": 0,
                    "offloaded": 0,
                    "discarded": 0,
                    "device": 0,
                    "host": 0,
                    "page_locked": 0,
                    "disk": 0,
                    "asleep_in_host": 0,
                    "asleep_on_disk": 0,
                    "allocations": 0,
                },
            )
            usage["allocations"] += 1
            usage[allocation["state"]] += allocation["bytes"]
            usage["device"] += allocation["device_bytes"]
            usage["host"] += allocation["host_bytes"]
            usage["page_locked"] += allocation["page_locked_bytes"]
            usage["disk"] += allocation["disk_bytes"]
            usage["asleep_in_host"] += allocation["asleep_in_host_bytes"]
            usage["asleep_on_disk"] += allocation["asleep_on_disk_bytes"]
        return tags

    def host_memory(self) -> HostMemoryStatus:
        """The source of page-locked memory, its bytes besides backups, and those that a sleep at
        level 1 needs."""
        memory = _camem.host_memory()
        needed, available = self.host_need(POLICY[1])
        return {
            "needed": needed,
            "available": available,
            "source": memory["source"],
            "why": memory["why"],
            "prepared": memory["prepared"],
            "staging": memory["staging"],
            "failure": memory["failure"],
        }

    def disk_backup(self) -> DiskBackupStatus | None:
        """Where backups on disk lie; None without ``backup_dir``."""
        directory = self._config.backup_dir
        if directory is None:
            return None
        memory = _camem.host_memory()
        return {
            "directory": directory,
            "bytes": sum(a["disk_bytes"] for a in _camem.allocations()),
            "blocks": memory["disk_staging"],
            "why_not_direct": memory["why_not_direct"],
        }

    def disk_need(
        self,
        actions: Mapping[str, Action],
        otherwise: Action = "offload",
        place: Place | None = None,
    ) -> tuple[str, int, int] | None:
        """The directory of backups, the bytes there that a sleep with these actions needs beyond
        what is held already, and bytes that are free; None if none go to disk.

        Raises:
            OSError: the directory's file system does not say.
        """
        directory = self._config.backup_dir
        if directory is None or (place or self._config.place) != "disk":
            return None
        needed = sum(
            a["bytes"] - a["disk_bytes"]
            for a in _to_store(_camem.allocations(), actions, otherwise, place)
        )
        return directory, needed, shutil.disk_usage(directory).free

    def host_need(
        self,
        actions: Mapping[str, Action],
        otherwise: Action = "offload",
        place: Place | None = None,
    ) -> tuple[int, int]:
        """Host bytes that a sleep with these actions needs beyond what is held already, and bytes
        that the machine or this process's control group has left. A disk's blocks do not count: a
        host without memory for them is left with fewer."""
        if (place or self._config.place) == "disk":
            return 0, _camem.available_host_bytes()
        needed = sum(
            max(0, a["bytes"] - a["host_bytes"])
            for a in _to_store(_camem.allocations(), actions, otherwise, place)
        )
        prepared = _camem.host_memory()["prepared"]
        return max(0, needed - prepared), _camem.available_host_bytes()

    def sleep(
        self,
        operation: str,
        actions: dict[str, Action],
        otherwise: Action = "offload",
        place: Place | None = None,
    ) -> None:
        """Apply ``actions`` to these tags, and ``otherwise`` to all others. A program's own regions
        are left unchanged unless they are named. With ``place`` backups go there, also those of
        memory that sleeps already."""
        apart = (tag for tag in _camem.tags() if tag.startswith(PROGRAM))
        actions = {**dict.fromkeys(apart, "keep"), **actions}
        gc.collect()
        pool.trim()
        contents = self._checksums(actions, otherwise)
        torch.accelerator.empty_cache()
        # Nothing that can fail follows.
        with logged(operation):
            report = _camem.sleep(
                actions, otherwise, contents, place=place or "", commit=self.commits_at_once
            )
        self._prepared, self._place = operation, place
        if self.commits_at_once:
            self._finish(report)

    def _checksums(self, actions: dict[str, Action], otherwise: Action) -> dict[int, int]:
        """Checksums of what will be copied, by address; empty unless an option enables them."""
        if not (self._config.skip_unchanged or self._config.verify_wake):
            return {}
        return checksums(
            [
                (a["address"], a["bytes"])
                for a in _to_offload(_camem.allocations(), actions, otherwise)
            ],
            current_device(),
        )

    def _verify(self, addresses: set[int]) -> None:
        """Raise WeightsError if the content of memory that just woke has changed."""
        woken = [
            a
            for a in _camem.allocations()
            if a["address"] in addresses and a["state"] == "mapped" and a["checksum"] is not None
        ]
        sums = checksums([(a["address"], a["bytes"]) for a in woken], current_device())
        changed = [a for a in woken if sums[a["address"]] != a["checksum"]]
        if not changed:
            return
        _camem.distrust_backups({a["address"] for a in changed})
        beyond_loading = any(a["tag"] != "weights" for a in changed)
        if not self.commits_at_once:
            remedy = "Repeat the wake, or " + (
                "restart the engine"
                if beyond_loading
                else "sleep at level 2, wake and load the weights"
            )
        else:
            remedy = "Restart the engine" if beyond_loading else "Load the weights again or restart"
        a = changed[0]
        error = WeightsError(
            f"wake brought back other content than went to sleep: tag {a['tag']!r}, "
            f"{a['bytes']} bytes at {a['address']:#x}, checksum {sums[a['address']]:#018x} "
            f"instead of {a['checksum']:#018x}. {remedy}"
        )
        error.tag, error.device, error.beyond_loading = a["tag"], a["device"], beyond_loading
        raise error

    def _finish(self, report: "_camem.Report") -> None:
        operation, self._prepared = self._prepared, ""
        copied = sum(tag["offloaded"] + tag["restored"] for tag in report["tags"].values())
        speed = copied / 1e9 / max(report["seconds"], 1e-9)
        self.last_operation = {
            "operation": operation,
            **report,
            "copied_bytes": copied,
            "copied_gb_per_s": round(speed, 3),
        }
        logger.info(
            "camem: %s took %.3f s, copied %.2f GiB at %.1f GB/s: %s",
            operation,
            report["seconds"],
            copied / _GIB,
            speed,
            _describe(report["tags"]) or "nothing to do",
        )
        self._log_host_memory()
        self._log_page_cache()
        weights = report["tags"].get("weights")
        discarded = weights is not None and weights["discarded"] > 0
        if self._place == "disk":
            self._release_prepared("a sleep to disk")
        elif discarded and self._config.host_backup == "auto":
            self._release_prepared("level 2")
        self._place = None

    def _release_prepared(self, by: str) -> None:
        """A sleep at level 2, or to disk, needs no host memory for the weights."""
        prepared = _camem.host_memory()["prepared"]
        _camem.release_prepared()
        if prepared:
            logger.info(
                "camem: %.2f GiB of prepared host memory go back: %s does not need it",
                prepared / _GIB,
                by,
            )


def _action(tag: str, actions: Mapping[str, Action], otherwise: Action) -> Action:
    return actions.get(tag, "keep" if tag.startswith(PROGRAM) else otherwise)


def _to_offload(
    allocations: "list[_camem.AllocationInfo]", actions: Mapping[str, Action], otherwise: Action
) -> "list[_camem.AllocationInfo]":
    """The allocations that a sleep with these actions copies to their backups."""
    return [
        a
        for a in allocations
        if a["state"] == "mapped" and _action(a["tag"], actions, otherwise) == "offload"
    ]


def _to_store(
    allocations: "list[_camem.AllocationInfo]",
    actions: Mapping[str, Action],
    otherwise: Action,
    place: Place | None,
) -> "list[_camem.AllocationInfo]":
    """Those, and the ones that sleep already and whose backups move to this place."""
    elsewhere: Literal["asleep_in_host_bytes", "asleep_on_disk_bytes"]
    elsewhere = "asleep_on_disk_bytes" if place == "host" else "asleep_in_host_bytes"
    moved = [
        a
        for a in allocations
        if place and a[elsewhere] and _action(a["tag"], actions, otherwise) == "offload"
    ]
    return [*_to_offload(allocations, actions, otherwise), *moved]


def _describe(tags: Mapping[str, Mapping[str, Any]]) -> str:
    def moves() -> Iterable[str]:
        for tag, moved in tags.items():
            for what, count in moved.items():
                if count:
                    yield f"{tag} {count / _GIB:.2f} GiB {what}"

    return ", ".join(moves())
