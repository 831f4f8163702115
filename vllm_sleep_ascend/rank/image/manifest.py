# SPDX-License-Identifier: Apache-2.0
"""What an image says of itself: ``image.json``, with the engine that it fits, and for each rank
what its file of bytes has."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.image.pieces import PIECE, close, named
from vllm_sleep_ascend.status import WeightsOrigin

HEAD = "image.json"
FORMAT = 1
_BROKEN = "save the image again"
_ENTRY = {"kind": str, "stride": list, "offset": int, "bytes": int}
_ORIGIN = {"source": str, "version": str}


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
    """``id``: the same in the parts of all hosts. ``identity``: of the engine. ``manifests``:
    SHA-256 of the other files like this one."""

    format: int
    id: str
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
    with named(path, "written"):
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        close(descriptor)


def checksum(path: Path) -> str:
    """Of a file like these."""
    return hashlib.sha256(_read(path)).hexdigest()


def read_head(directory: Path) -> Head:
    """
    Raises:
        ImageError: the directory has no image, or one of another format.
    """
    path = directory / HEAD
    with named(path, "read"):
        partial = directory.is_dir() and not path.exists()
    if partial:
        raise ImageError(
            f"{directory} is no saved image, or not a whole one: it has no {HEAD}, which is "
            "written last; name a directory that vllm-sleep save has made"
        )
    fields = {"format": int, "id": str, "identity": dict, "manifests": dict}
    head = _parsed(path, _read(path), fields)
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
    fields = {"bytes": int, "sha256": list, "tensors": dict, "weights": dict}
    part = cast(Rank, _parsed(path, content, fields))
    if (wrong := _wrong(part)) is not None:
        raise ImageError(f"{path} is damaged: {wrong}; {_BROKEN}")
    return part


def _wrong(part: Rank) -> str | None:
    """What cannot be so in it."""
    size, pieces = part["bytes"], -(-part["bytes"] // PIECE)
    if size < 0 or len(part["sha256"]) != pieces:
        return f"it has {len(part['sha256'])} checksums for {size} bytes"
    for name, entry in part["tensors"].items():
        if not isinstance(entry, dict) or {f: type(v) for f, v in entry.items()} != _ENTRY:
            return f"of {name} it does not say {', '.join(_ENTRY)}"
        start, length = entry["offset"], entry["bytes"]
        if not all(type(step) is int for step in entry["stride"]):
            return f"the strides of {name} are {entry['stride']}"
        if start < 0 or length < 0 or start + length > size:
            return f"{name} has {length} bytes at offset {start} of {size}"
    if {f: type(part["weights"].get(f)) for f in ("source", "version")} != _ORIGIN:
        return "it does not say where the weights came from"
    return None


def _read(path: Path) -> bytes:
    with named(path, "read"):
        return path.read_bytes()


def _parsed(path: Path, content: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict) or any(
        not isinstance(found.get(field), kind) for field, kind in fields.items()
    ):
        raise ImageError(f"{path} is damaged: it is no JSON with {', '.join(fields)}; {_BROKEN}")
    return found
