# SPDX-License-Identifier: Apache-2.0
"""Saves an image: every rank its part, or no rank anything.

The parts are written into a folder beside the directory, ``.NAME.RANDOM.saving``, which becomes the
directory when every rank is done. A killed process leaves that folder; the next image of the same
name removes it.
"""

import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.memory.device_wait import wait_for_device
from vllm_sleep_ascend.rank.agreement import Agreement, Operation
from vllm_sleep_ascend.rank.hooks import Hooks
from vllm_sleep_ascend.rank.host_budget import this_host
from vllm_sleep_ascend.rank.host_worker import HostWorker
from vllm_sleep_ascend.rank.image import identity, manifest, pieces, tensors
from vllm_sleep_ascend.rank.image.filling import image_of
from vllm_sleep_ascend.rank.weights.content import models_of
from vllm_sleep_ascend.rank.weights.loading import SLOWEST_LOAD
from vllm_sleep_ascend.rank.weights.rank_weights import RankWeights

logger = init_logger(f"vllm.{__name__}")

_SAVING = "saving"
_MANIFESTS = 1 << 20  # bytes of disk, more than they take
_RENAME_EXCHANGE = 2  # of renameat2
_AT_FDCWD = -100


@dataclass(frozen=True)
class _Facts:
    """What a rank says before it writes: why it cannot, or what it needs of which disk; and a word
    for the folder's name, of which that of the first rank counts."""

    rank: int
    word: str
    refusal: str | None
    host: str = ""
    disk: int = 0  # st_dev
    needed: int = 0
    available: int = 0


def save(
    worker: HostWorker,
    agreement: Agreement,
    weights: RankWeights,
    hooks: Hooks,
    engine: Mapping[str, Any],
    directory: str,
    replace: bool,
) -> None:
    """Save the model's weights into ``directory``, on each host of the engine.

    Args:
        engine: its identity from before its model was made.
        replace: an image that is there already.

    Raises:
        ValueError: the directory is no absolute path.
        ImageError: a rank cannot save, or failed; there is no image then, or the one before.
    """
    if not os.path.isabs(directory):
        raise ValueError(f"dir={directory!r}: an absolute path is needed, such as /images/NAME")
    attempt = _Attempt(worker, weights, hooks, engine, Path(os.path.realpath(directory)), replace)
    operation = Operation(
        "save_image",
        (attempt.write, attempt.publish),
        commit=attempt.finish,
        abort=attempt.take_back,
        facts=attempt.facts,
        judge=attempt.judge,
        timeout=SLOWEST_LOAD,
    )
    try:
        agreement.carry_out(operation)
    except Exception as error:
        if agreement.size > 1:
            write_type(error)
        raise
    finally:
        attempt.close()
    logger.info("Rank %d: saved %d bytes in %s", worker.rank, attempt.size, directory)


class _Attempt:
    def __init__(
        self,
        worker: HostWorker,
        weights: RankWeights,
        hooks: Hooks,
        engine: Mapping[str, Any],
        directory: Path,
        replace: bool,
    ) -> None:
        self._worker, self._weights, self._hooks = worker, weights, hooks
        self._directory, self._replace = directory, replace
        self._engine = engine
        self._folder = directory
        self._lock = -1
        self._published = False
        self._replaced: Path | None = None  # where the image is that was there before

    # --- Before anything is written --------------------------------------------------------------

    def facts(self) -> _Facts:
        rank, word, parent = self._worker.rank, secrets.token_hex(4), self._directory.parent
        try:
            refusal = self._refusal()
            if refusal is not None:
                return _Facts(rank, word, refusal)
            self._look()
            status, device = os.statvfs(parent), os.stat(parent).st_dev
        except Exception as error:  # the other ranks wait for what this one says
            return _Facts(rank, word, f"{type(error).__name__}: {error}")
        needed = pieces.file_bytes(self.size) + _MANIFESTS
        available = status.f_bavail * status.f_frsize
        return _Facts(rank, word, None, this_host()[0], device, needed, available)

    def _refusal(self) -> str | None:
        directory, worker, weights = self._directory, self._worker, self._weights
        reason = self._hooks.image_refusal() or identity.refusal(worker.vllm_config)
        if reason is not None:
            return f"an image is not supported with {reason}"
        if weights.updating:
            return "a weight update is under way; call finish_weight_update first"
        if missing := weights.content.missing():
            names = ", ".join(missing[:4])
            return f"{len(missing)} parameters have no content ({names}); load the weights first"
        draft = weights.origin().get("draft")
        if draft is not None and draft["source"] != "checkpoint":
            return (
                f"the draft model's weights (source: {draft['source']}) are in no checkpoint, and "
                "an image has the model's own alone; load the draft model's checkpoint first"
            )
        if not directory.parent.is_dir():
            return f"{directory.parent} is no directory; create it, on a disk with room"
        if not os.path.lexists(directory):
            return None
        if not self._replace:
            return (
                f"{directory} exists; name another directory, or replace the image in it "
                "(--replace)"
            )
        if not _is_image(directory):
            return (
                f"{directory} exists and is no saved image, which alone is replaced; name another "
                "directory"
            )
        return None

    def _look(self) -> None:
        """At what there is to be saved."""
        model = models_of(self._worker)[""]
        image = image_of(model)
        if image is not None:
            self._engine = image.identity
        self._tensors = _of_weights(self._worker, model)
        self._offsets, self._spans, self.size = tensors.laid_out(self._tensors)

    def judge(self, ranks: Sequence[_Facts]) -> None:
        """
        Raises:
            ImageError: a rank cannot save, or a disk has no room for those that share it; the same
                on every rank.
        """
        refusals = dict.fromkeys(rank.refusal for rank in ranks if rank.refusal is not None)
        if refusals:
            raise ImageError(f"no image was saved: {'; '.join(refusals)}. Nothing was touched")
        disks: dict[tuple[str, int], list[_Facts]] = {}
        for rank in ranks:
            disks.setdefault((rank.host, rank.disk), []).append(rank)
        for shares in disks.values():
            needed, free = sum(r.needed for r in shares), min(r.available for r in shares)
            if needed > free:
                those = ", ".join(str(r.rank) for r in shares)
                error = ImageError(
                    f"no image was saved: ranks {those} need {needed} bytes in "
                    f"{self._directory.parent} and {free} are free; free disk space, or save to "
                    "another disk. Nothing was touched"
                )
                error.needed_bytes, error.free_bytes = needed, free
                raise error
        self._folder = self._directory.with_name(
            f".{self._directory.name}.{ranks[0].word}.{_SAVING}"
        )

    # --- The two steps ---------------------------------------------------------------------------

    def write(self) -> None:
        """This rank's part."""
        rank, folder = self._worker.rank, self._folder
        self._remove_left()
        try:
            folder.mkdir(exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        except OSError as error:
            raise pieces.failure(folder, "created", error) from error
        wait_for_device()
        path = folder / manifest.weights_name(rank)
        checksums = pieces.write(path, self._spans, self.size)
        entries: dict[str, manifest.Entry] = {
            name: {
                "kind": tensor.kind,
                "stride": list(tensor.stride),
                "offset": self._offsets[name],
                "bytes": tensor.bytes,
            }
            for name, tensor in self._tensors.items()
        }
        written: manifest.Rank = {
            "bytes": self.size,
            "sha256": checksums,
            "tensors": entries,
            "weights": self._weights.origin(),
        }
        manifest.write(folder / manifest.manifest_name(rank), written)

    def publish(self) -> None:
        """Once every rank has written, the first of those that share the folder renames it."""
        folder, directory = self._folder, self._directory
        count = self._worker.parallel_config.world_size
        names = [manifest.manifest_name(rank) for rank in range(count)]
        here = [name for name in names if (folder / name).exists()]
        if here[:1] != [manifest.manifest_name(self._worker.rank)]:
            return
        head: manifest.Head = {
            "format": manifest.FORMAT,
            "identity": dict(self._engine),
            "manifests": {name: manifest.checksum(folder / name) for name in here},
        }
        manifest.write(folder / manifest.HEAD, head)
        try:
            if self._replace and os.path.lexists(directory):
                self._replaced = _exchange(folder, directory)
            else:
                folder.rename(directory)
            self._published = True
            manifest.sync_directory(directory.parent)
        except OSError as error:
            raise pieces.failure(directory, "created", error) from error

    # --- The end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Remove the image that was replaced."""
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)

    def take_back(self) -> str:
        """Leave what was there before. Returns what failed in that, or ``""``."""
        gone = self._folder
        if self._published:
            try:
                gone = self._directory.rename(gone.with_suffix(f".again.{_SAVING}"))
                if self._replaced is not None:
                    self._replaced.rename(self._directory)
            except OSError as error:
                return str(pieces.failure(self._directory, "removed again", error))
        if gone != self._directory:
            shutil.rmtree(gone, ignore_errors=True)
        return ""

    def close(self) -> None:
        """Let other processes remove the folder, if it is still there."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _remove_left(self) -> None:
        """Remove what killed processes have left: nobody has it locked."""
        for left in self._directory.parent.glob(f".{self._directory.name}.*.{_SAVING}"):
            if left == self._folder:
                continue
            with suppress(OSError):
                lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(lock)


def _of_weights(worker: HostWorker, model: nn.Module) -> dict[str, tensors.Held]:
    """Parameters and buffers, and of other tensors those in the memory of the weights."""
    ranges = worker.sleep_mode_backend.ranges("weights")
    attached = {
        name: tensor
        for name, tensor in tensors.attached(model).items()
        if any(0 <= tensor.address - start < size for start, size in ranges)
    }
    return {**attached, **tensors.registered(model)}


def _is_image(directory: Path) -> bool:
    """Whether a directory has an image and nothing else."""
    if not (directory / manifest.HEAD).is_file():
        return False
    return all(
        path.name == manifest.HEAD
        or (path.name.startswith("rank-") and path.suffix in (".json", ".weights"))
        for path in directory.iterdir()
    )


def _exchange(new: Path, old: Path) -> Path:
    """Have ``old`` be the new folder, at once where the file system can do that. Returns where the
    old one is."""
    call: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (os.fsencode(new), os.fsencode(old))
    if call is not None and not call(
        _AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)
    ):
        return new
    aside = old.rename(new.with_suffix(f".replaced.{_SAVING}"))
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    return aside
