# SPDX-License-Identifier: Apache-2.0
"""What a server's ranks say of its memory (GET /sleep_status), checked: a server may be of another
version, or something else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Device:
    """Bytes of one device; ``held``: by the server, for each tag or cause."""

    index: int
    total: int
    free: int
    held: dict[str, int]


@dataclass(frozen=True)
class Copy:
    """The last sleep or wake of all ranks, which run at the same time."""

    operation: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Told:
    """``memory``: bytes by place, of all ranks; ``copy`` is None if a rank has not copied."""

    memory: dict[str, int]
    devices: list[Device]
    copy: Copy | None


def read(ranks: object) -> Told | None:
    """What they say; None if they do not tell, or not in this shape."""
    if not isinstance(ranks, list):
        return None
    try:
        return Told(
            _memory(ranks), [_device(rank) for rank in ranks if "total" in rank], _copy(ranks)
        )
    except _WRONG:
        return None


def _memory(ranks: Sequence[Any]) -> dict[str, int]:
    usages = [usage for rank in ranks for usage in rank.get("tags", {}).values()]
    return {
        "device": sum(_bytes(usage["device"]) for usage in usages),
        "host": sum(_bytes(usage["host"]) for usage in usages),
        "disk": sum(_bytes(usage.get("disk", 0)) for usage in usages),
    }


def _device(rank: Any) -> Device:
    held = {tag: _bytes(usage["device"]) for tag, usage in rank.get("tags", {}).items()}
    causes = {cause: _bytes(size) for cause, size in rank.get("resident", {}).items()}
    index, total, free = (_bytes(rank[name]) for name in ("device", "total", "free"))
    return Device(index, total, free, causes | held)


def _copy(ranks: Sequence[Any]) -> Copy | None:
    last = [rank.get("last_operation") for rank in ranks]
    if not last or not all(last):
        return None
    names = {str(each["operation"]).partition(" ")[0] for each in last}
    if len(names) > 1:
        return None
    seconds = max(float(each["seconds"]) for each in last)
    if not math.isfinite(seconds):
        raise ValueError("seconds")
    return Copy(names.pop(), sum(_bytes(each["copied_bytes"]) for each in last), seconds)


def _bytes(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value
