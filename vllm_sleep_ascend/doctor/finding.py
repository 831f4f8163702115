# SPDX-License-Identifier: Apache-2.0
"""The result of one check."""

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["info", "pass", "degraded", "fail", "not probed"]


@dataclass(frozen=True)
class Finding:
    """``found`` is one line, ``means`` and ``remedy`` say what it means and what to do, ``figures``
    are for programs: sizes in bytes, speeds in GB/s (10^9 bytes)."""

    status: Status
    found: str
    means: str = ""
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def of_call(error: BaseException) -> dict[str, Any]:
    """The figures of a failed call. Errors of the compiled allocator name their call and its code
    as those of AscendCL here do."""
    return {name: getattr(error, name) for name in ("call", "code") if getattr(error, name, None)}


def info(found: str, **figures: Any) -> Finding:
    return Finding("info", found, "", "", figures)


def passed(found: str, **figures: Any) -> Finding:
    return Finding("pass", found, "", "", figures)


def degraded(found: str, means: str, remedy: str, **figures: Any) -> Finding:
    return Finding("degraded", found, means, remedy, figures)


def failed(found: str, means: str, remedy: str, **figures: Any) -> Finding:
    return Finding("fail", found, means, remedy, figures)


def not_probed(why: str, remedy: str = "", **figures: Any) -> Finding:
    return Finding("not probed", why, "", remedy, figures)
