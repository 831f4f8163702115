# SPDX-License-Identifier: Apache-2.0
"""The report as text for people, and as a JSON object."""

from dataclasses import asdict, dataclass, field
from textwrap import TextWrapper
from typing import Any

from vllm_sleep_ascend.doctor.finding import Finding
from vllm_sleep_ascend.doctor.sizes import gib_of

USABLE, FAILED, REFUSED = range(3)  # the exit codes
_WIDTH = 100
_MARKS = {"info": "-"}


@dataclass
class Report:
    """``surroundings`` and ``probes`` map a name to title and finding."""

    device: int
    seconds: float = 0
    refusal: str = ""
    size_bytes: int = 0
    soc: str = ""
    acl_version: str = ""
    devices: list[dict[str, Any]] = field(default_factory=list)
    surroundings: dict[str, tuple[str, Finding]] = field(default_factory=dict)
    probes: dict[str, tuple[str, Finding]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        if self.refusal:
            return REFUSED
        whole = self.probes.get("sleep_and_wake")
        unknown = whole is not None and whole[1].status == "not probed"
        return FAILED if unknown or self._count("fail") else USABLE

    def _count(self, status: str) -> int:
        return sum(finding.status == status for _, finding in self._all().values())

    def _all(self) -> dict[str, tuple[str, Finding]]:
        return self.surroundings | self.probes

    def as_json(self) -> dict[str, Any]:
        def entries(findings: dict[str, tuple[str, Finding]]) -> dict[str, Any]:
            return {
                name: {"title": title, **asdict(finding)}
                for name, (title, finding) in findings.items()
            }

        probes = entries(self.probes)
        for name, seconds in self.timings.items():
            probes[name]["seconds"] = round(seconds, 3)
        return {
            "command": "doctor",
            "ok": self.exit_code == USABLE,
            "exit_code": self.exit_code,
            "verdict": self._verdict(),
            "refusal": self.refusal,
            "device": self.device,
            "soc": self.soc,
            "acl_version": self.acl_version,
            "size_bytes": self.size_bytes,
            "seconds": round(self.seconds, 3),
            "devices": self.devices,
            "surroundings": entries(self.surroundings),
            "probes": probes,
        }

    def as_page(self) -> str:
        width = max(len(title) for title, _ in self._all().values())
        about = f"device {self.device}" + (f", {self.soc}" if self.soc else "")
        lines = [f"vllm-sleep doctor: {about}"]
        lines += ["", "Surroundings", *_rows(self.surroundings, width)]
        lines += [
            _row("-", f"device {device['device']}", _memory(device), width)
            for device in self.devices
            if f"device {device['device']}" not in dict(self.surroundings.values())
        ]
        if self.probes:
            lines += ["", f"Probes of device {self.device}", *self._probe_rows(width)]
        lines += self._to_do()
        return "\n".join([*lines, "", self._summary()])

    def _probe_rows(self, width: int) -> list[str]:
        """A row for each probe; probes skipped for the same reason share one."""
        reasons = {finding.found for _, finding in self.probes.values()}
        if len(reasons) > 1:
            return _rows(self.probes, width)
        return [_row("not probed", "all", reasons.pop(), width)]

    def _to_do(self) -> list[str]:
        wrap = TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ").wrap
        lines = []
        for title, finding in self._all().values():
            if text := " ".join(filter(None, (finding.means, finding.remedy))):
                lines += wrap(f"{title}: {text}")
        return ["", "What it means, and what to do", *lines] if lines else []

    def _verdict(self) -> str:
        return ("usable", "failed", "refused")[self.exit_code]

    def _summary(self) -> str:
        if self.refusal:
            return f"refused: {self.refusal}"
        counts = ", ".join(
            f"{count} {status}"
            for status in ("pass", "degraded", "fail", "not probed")
            if (count := self._count(status))
        )
        if self.exit_code == USABLE:
            verdict = "sleep mode can be used"
        elif self._count("fail"):
            verdict = "sleep mode cannot be used"
        else:
            verdict = "not known whether sleep mode can be used"
        return f"{verdict}: {counts}; {self.seconds:.0f} s"


def _rows(findings: dict[str, tuple[str, Finding]], width: int) -> list[str]:
    return [
        _row(_MARKS.get(finding.status, finding.status), title, finding.found, width)
        for title, finding in findings.values()
    ]


def _row(mark: str, title: str, text: str, width: int) -> str:
    return f"  {mark:<10}  {title:<{width}}  {text}"


def _memory(device: dict[str, Any]) -> str:
    if "error" in device:
        return device["error"]
    return f"{gib_of(device['free_bytes'], device['total_bytes'])} free"
