# SPDX-License-Identifier: Apache-2.0
"""What an image says of itself: ``image.json``, with the engine that it fits, and for each rank
what its file of bytes has."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypedDict, cast

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.image.pieces import failure
from vllm_sleep_ascend.status import WeightsOrigin

HEAD = "image.json"
FORMAT = 1
_BROKEN = "save the image again"


class Entry(TypedDict):
    """A tensor: see ``tensors.Held``. ``offset`` is where its bytes begin in the file."""

    kind: str
    stride: list[int]
    offset: int
    bytes: int


class Rank(TypedDict):
    """What a rank's file has, and where the weights came from. ``sha256`` is of each piece."""

    bytes: int
    sha256: list[str]
    tensors: dict[str, Entry]
    weights: WeightsOrigin


class Head(TypedDict):
    """``identity``: of the engine. ``manifests``: SHA-256 of the other files like this one."""

    format: int
    identity: dict[str, Any]
    manifests: dict[str, str]


def manifest_name(rank: int) -> str:
    return f"rank-{rank}.json"


def weights_name(rank: int) -> str:
    return f"rank-{rank}.weights"


def write(path: Path, content: Rank | Head) -> None:
    """Write it at once or not at all, and wait for the disk.

    Raises:
        ImageError: the disk is full, or failed.
    """
    partial = path.with_name(f".{path.name}")
    try:
        with partial.open("w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise failure(path, "written", error) from error


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """Of a file like these."""
    return hashlib.sha256(_read(path)).hexdigest()


def read_head(directory: Path) -> Head:
    """
    Raises:
        ImageError: the directory has no image, or one of another format.
    """
    path = directory / HEAD
    if directory.is_dir() and not path.exists():
        raise ImageError(
            f"{directory} is no saved image, or not a whole one: it has no {HEAD}, which is "
            "written last; name a directory that vllm-sleep save has made"
        )
    head = _parsed(path, _read(path), ("format", "identity", "manifests"))
    if head["format"] != FORMAT:
        raise ImageError(
            f"{path} has the format {head['format']!r}, and this vllm_sleep_ascend reads "
            f"{FORMAT}; save the image again"
        )
    return cast(Head, head)


def read_rank(directory: Path, head: Head, rank: int) -> Rank:
    """
    Raises:
        ImageError: it is missing, or not the one that the image was saved with.
    """
    path = directory / manifest_name(rank)
    expected = head["manifests"].get(path.name)
    if expected is None:
        there = ", ".join(sorted(head["manifests"]))
        raise ImageError(
            f"{directory} has nothing for rank {rank}, only {there}: the image was saved on "
            "several hosts, and each starts from its own part; copy the directory from the host "
            "of that rank"
        )
    content = _read(path)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ImageError(
            f"{path} is not what was written: it has the SHA-256 {found} instead of {expected}; "
            f"{_BROKEN}"
        )
    return cast(Rank, _parsed(path, content, ("bytes", "sha256", "tensors", "weights")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise failure(path, "read", error) from error


def _parsed(path: Path, content: bytes, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= set(fields):
        raise ImageError(f"{path} is damaged: it is no JSON with {', '.join(fields)}; {_BROKEN}")
    return found
