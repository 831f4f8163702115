# SPDX-License-Identifier: Apache-2.0
"""Saves an image: every rank its part, or no rank anything.

The parts are written into a folder beside the directory (``folder``), which becomes the directory
when every rank is done.
"""

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import ImageError, ImageRefusedError
from vllm_sleep_ascend.memory.device_wait import wait_for_device
from vllm_sleep_ascend.rank.agreement import Agreement, Operation
from vllm_sleep_ascend.rank.hooks import Hooks
from vllm_sleep_ascend.rank.host_budget import this_host
from vllm_sleep_ascend.rank.host_worker import HostWorker
from vllm_sleep_ascend.rank.image import identity, manifest, pieces, tensors
from vllm_sleep_ascend.rank.image.filling import image_of
from vllm_sleep_ascend.rank.image.folder import Folder, bring_back, exists, is_image
from vllm_sleep_ascend.rank.weights.content import models_of
from vllm_sleep_ascend.rank.weights.loading import SLOWEST_LOAD
from vllm_sleep_ascend.rank.weights.rank_weights import RankWeights

logger = init_logger(f"vllm.{__name__}")

_MANIFESTS = 1 << 20  # bytes of disk, more than they take


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
    engine: Mapping[str, Any] | str,
    directory: str,
    replace: bool,
) -> None:
    """Save the model's weights into ``directory``, on each host of the engine.

    Args:
        engine: its identity from before its model was made, or why it has none.
        replace: an image that is there already.

    Raises:
        ValueError: the directory is no absolute path.
        ImageRefusedError: a rank cannot save; nothing was touched.
        ImageError: a rank failed; there is no image then, or the one before.
    """
    if not os.path.isabs(directory):
        raise ValueError(f"dir={directory!r}: an absolute path is needed, such as /images/NAME")
    attempt = _Attempt(worker, weights, hooks, engine, Path(os.path.realpath(directory)), replace)
    operation = Operation(
        "save_image",
        (attempt.write, attempt.publish),
        commit=attempt.finish,
        abort=attempt.roll_back,
        facts=attempt.facts,
        judge=attempt.judge,
        timeout=SLOWEST_LOAD,
    )
    try:
        agreement.carry_out(operation)
    except Exception as error:
        if agreement.size > 1 or isinstance(error, ImageRefusedError):
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
        engine: Mapping[str, Any] | str,
        directory: Path,
        replace: bool,
    ) -> None:
        self._worker, self._weights, self._hooks = worker, weights, hooks
        self._directory, self._replace = directory, replace
        self._engine = engine
        self._there: int | None = None  # the inode of the image that may be replaced
        self._folder: Folder | None = None
        self._id = ""

    # --- Before anything is written --------------------------------------------------------------

    def facts(self) -> _Facts:
        rank, word, parent = self._worker.rank, secrets.token_hex(4), self._directory.parent
        try:
            refusal = self._refusal()
            if refusal is not None:
                return _Facts(rank, word, refusal)
            self._look()
            available, device = shutil.disk_usage(parent).free, os.stat(parent).st_dev
            host, _ = this_host()
        except Exception as error:  # the other ranks wait for what this one says
            if isinstance(error, OSError):
                error = pieces.failure(self._directory, "looked at", error)
            return _Facts(rank, word, f"{type(error).__name__}: {error}")
        needed = pieces.file_bytes(self.size) + _MANIFESTS
        return _Facts(rank, word, None, host, device, needed, available)

    def _refusal(self) -> str | None:
        directory, worker, weights = self._directory, self._worker, self._weights
        reason = self._hooks.image_refusal() or identity.refusal(worker.vllm_config)
        if reason is not None:
            return f"an image is not supported with {reason}"
        if weights.updating:
            return "a weight update is under way; call finish_weight_update first"
        if isinstance(self._engine, str):
            return self._engine
        if weights.content.corrupt:
            return "the weights were found to be corrupt; load them again, or restart the engine"
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
        bring_back(directory)
        if not exists(directory):
            self._there = 0 if self._replace else None
            return None
        if not self._replace:
            return (
                f"{directory} exists; name another directory, or replace the image in it "
                "(--replace)"
            )
        if not is_image(directory):
            return (
                f"{directory} exists and is no saved image, which alone is replaced; name another "
                "directory"
            )
        self._there = directory.stat().st_ino
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
            ImageRefusedError: a rank cannot save.
            ImageError: a disk has no room for those that share it; the same on every rank.
        """
        refusals = dict.fromkeys(rank.refusal for rank in ranks if rank.refusal is not None)
        if refusals:
            raise ImageRefusedError(
                f"no image was saved: {'; '.join(refusals)}. Nothing was touched"
            )
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
        word = ranks[0].word
        self._folder, self._id = Folder(self._directory, word), f"{word}-{len(ranks)}"

    # --- The two steps ---------------------------------------------------------------------------

    def write(self) -> None:
        """This rank's part."""
        assert self._folder is not None
        self._folder.make()
        rank, folder = self._worker.rank, self._folder.path
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
        """Once every rank has written, the first of those that share the folder publishes it."""
        assert self._folder is not None and not isinstance(self._engine, str)
        folder = self._folder.path
        names = map(manifest.manifest_name, range(self._worker.parallel_config.world_size))
        with pieces.named(folder, "read"):
            here = [name for name in names if (folder / name).exists()]
        mine = manifest.manifest_name(self._worker.rank)
        if not here and self._worker.rank == 0:
            raise ImageError(f"{folder} has no {mine} any more: another rank has given up")
        if here[:1] != [mine]:  # also if the folder is published already
            return
        head: manifest.Head = {
            "format": manifest.FORMAT,
            "id": self._id,
            "identity": dict(self._engine),
            "manifests": {name: manifest.checksum(folder / name) for name in here},
        }
        manifest.write(folder / manifest.HEAD, head)
        self._folder.publish(self._there)

    # --- The end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Remove the image that was replaced."""
        if self._folder is not None:
            self._folder.finish()

    def roll_back(self) -> str:
        """Leave what was there before. Returns what failed in that, or ``""``."""
        return "" if self._folder is None else self._folder.roll_back()

    def close(self) -> None:
        """Let other processes remove the folder, if it is still there."""
        if self._folder is not None:
            self._folder.close()


def _of_weights(worker: HostWorker, model: nn.Module) -> dict[str, tensors.Held]:
    """Parameters and buffers, and of other tensors those in the memory of the weights."""
    ranges = worker.sleep_mode_backend.ranges("weights")
    attached = {
        name: tensor
        for name, tensor in tensors.attached(model).items()
        if tensor.device == worker.device
        and any(0 <= tensor.address - start < size for start, size in ranges)
    }
    return {**attached, **tensors.registered(model)}
