# SPDX-License-Identifier: Apache-2.0
"""The command: which probes run, in which order and for how long."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_sleep_ascend.doctor import surroundings
from vllm_sleep_ascend.doctor.acl import NO_RESOURCE, AclError, AclMissing
from vllm_sleep_ascend.doctor.child import Child, Crash, Silence
from vllm_sleep_ascend.doctor.finding import (
    Finding,
    degraded,
    failed,
    not_probed,
    of_call,
    passed,
)
from vllm_sleep_ascend.doctor.probes import PROBES
from vllm_sleep_ascend.doctor.probes.base import Probe
from vllm_sleep_ascend.doctor.report import REFUSED, Report
from vllm_sleep_ascend.doctor.sizes import GIB, MIB, gib, gib_of
from vllm_sleep_ascend.memory.host import available_host_bytes

HELP = "find out whether sleep mode can work on this machine"
_DETAILS = """
Checks the host, the driver, CANN, the packages and the environment, then probes what sleep mode
needs of the device. The device should be idle; no engine has to run. Takes less than a minute.
Exit codes: 0 sleep mode can be used (pass or degraded), 1 something failed, 2 wrong usage or
refused.
"""
_TIMEOUT_S = 10.0
_WHOLE_S = 42.0  # no probe starts later, with the default --timeout
_LATEST_S = 55.0  # no wait goes on longer, not even for the end of a process
_IN_USE_BELOW = 0.9  # with less free memory, other processes use the device
_LOOK_S = 25.0  # for a look at the device, which has to be set
_LAST_LOOK_S = 8.0
_OTHER_LOOK_S = 3.0  # for each other device, which may be slow or stuck
_LEAST_S = 2.0  # with less time left, a probe is skipped
_NOT_GIVEN_BACK = 64 * MIB  # larger than the differences between contexts of processes
_UNIT = 2 * MIB
_SEE_LOG = "See npu-smi info, and CANN's log."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{HELP}.{_DETAILS}"
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="compare a checkpoint with the host's memory"
    )
    parser.add_argument(
        "--device", type=int, default=0, metavar="N", help="index of a visible device (0)"
    )
    parser.add_argument(
        "--gib",
        type=float,
        metavar="N",
        help="memory that sleeps and wakes (1, or half of the free memory if that is less)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument(
        "--force", action="store_true", help="probe a device that other processes use"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="S",
        help="time limit of a probe in seconds; some get up to three times as long (10)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, and return the exit code."""
    try:
        report = _examine(args)
    except ValueError as error:
        print(f"vllm-sleep doctor: {error}", file=sys.stderr)
        return REFUSED
    print(json.dumps(report.as_json()) if args.json else report.as_page())
    return report.exit_code


def _examine(args: argparse.Namespace) -> Report:
    """
    Raises:
        ValueError: an argument is invalid; it names the value.
    """
    _check(args)
    started = time.monotonic()
    report = Report(args.device, surroundings=surroundings.find())
    latest = started + _LATEST_S * max(1.0, args.timeout / _TIMEOUT_S)
    with Child(latest) as child:
        _Examination(args, child, report, started).run()
    report.seconds = time.monotonic() - started
    return report


def _check(args: argparse.Namespace) -> None:
    if args.device < 0:
        raise ValueError(f"--device {args.device} is not a number of a device")
    if args.gib is not None and not 0 < args.gib <= 1024:
        raise ValueError(f"--gib {args.gib:g} is not above 0 and at most 1024")
    if not 0 < args.timeout <= 3600:
        raise ValueError(f"--timeout {args.timeout:g} is not above 0 and at most 3600")
    if args.model is not None:
        surroundings.weight_bytes(args.model)


class _Examination:
    def __init__(
        self, args: argparse.Namespace, child: Child, report: Report, started: float
    ) -> None:
        self._args, self._child, self._report = args, child, report
        self._scale = args.timeout / _TIMEOUT_S
        self._end = started + _WHOLE_S * self._scale

    def run(self) -> None:
        free = self._find_device()
        if free is None:
            return
        self._report.size_bytes = self._size(free)
        for probe in PROBES:
            self._report.probes[probe.name] = (probe.title, self._probe(probe))
        self._child.end()
        self._report.probes["given_back"] = ("all given back", self._given_back(free))

    def _find_device(self) -> int | None:
        """Free bytes of the device, or None if it cannot be probed; the report says why.

        Raises:
            ValueError: there is no such device.
        """
        report, index = self._report, self._args.device
        self._progress("looking at the device")
        try:
            seen = self._child.look(_LOOK_S * max(1, self._scale), index)
        except (Silence, Crash, AclMissing, AclError) as error:
            report.surroundings["ascendcl"] = ("AscendCL", _no_ascendcl(error))
            self._about_model(devices=1)
            self._skip_all("AscendCL does not work")
            return None
        count = seen["count"]
        report.soc, report.acl_version = seen["soc"], seen["acl_version"]
        report.surroundings["ascendcl"] = ("AscendCL", _ascendcl(seen["soc"], count))
        self._about_model(count)
        if count == 0:
            self._skip_all("there is no device")
            return None
        if index >= count:
            raise ValueError(f"there is no device {index}; visible devices: {count}, from 0")
        (chosen,) = seen["devices"]
        report.devices = self._look_at_all(count, chosen)
        if "error" in chosen:
            report.surroundings["device"] = (f"device {index}", _broken_device(chosen))
            self._skip_all("the device does not work")
            return None
        free, total = chosen["free_bytes"], chosen["total_bytes"]
        if free < _IN_USE_BELOW * total and not self._args.force:
            report.refusal = (
                f"device {index} is in use: {gib_of(free, total)} are free. "
                "Choose another one with --device, or probe it all the same with --force"
            )
            return None
        return free

    def _look_at_all(self, count: int, chosen: dict[str, Any]) -> list[dict[str, Any]]:
        """The memory of every device. A device that does not answer delays nothing else."""
        devices = [chosen]
        for device in range(count):
            if device == chosen["device"] or self._within(_OTHER_LOOK_S) <= 0:
                continue
            try:
                devices += self._child.look(self._within(_OTHER_LOOK_S), device)["devices"]
            except (Silence, Crash, AclMissing, AclError) as error:
                devices.append({"device": device, "error": str(error)})
        return sorted(devices, key=lambda device: device["device"])

    def _about_model(self, devices: int) -> None:
        if self._args.model is not None:
            finding = surroundings.weights(self._args.model, max(1, devices))
            self._report.surroundings["model"] = ("model", finding)
            title, _ = self._report.surroundings["memlock"]
            locked = surroundings.memlock(finding.figures["weights_bytes"])
            self._report.surroundings["memlock"] = (title, locked)

    def _size(self, free: int) -> int:
        """
        Raises:
            ValueError: the requested size does not fit.
        """
        available = available_host_bytes()
        if self._args.gib is None:
            size = min(GIB, free // 2, available // 2)
        else:
            size = int(self._args.gib * GIB)
            if size > min(free, available):
                raise ValueError(
                    f"--gib {self._args.gib:g} does not fit: {gib(free)} of the device and "
                    f"{gib(available)} of the host are free"
                )
        return max(_UNIT, size // _UNIT * _UNIT)

    def _skip_all(self, why: str) -> None:
        for probe in PROBES:
            self._report.probes[probe.name] = (probe.title, not_probed(why))

    def _probe(self, probe: Probe) -> Finding:
        for need in probe.needs:
            title, finding = self._report.probes[need]
            if finding.status in ("fail", "not probed"):
                return not_probed(f'"{title}" comes first, and has not passed')
        timeout_s = self._within(probe.deadline_s)
        if timeout_s < min(_LEAST_S, probe.deadline_s * self._scale):
            return not_probed("the time was up; give it more with --timeout")
        self._progress(f"probing: {probe.title}")
        started = time.monotonic()
        finding = self._ask(probe, timeout_s)
        self._report.timings[probe.name] = time.monotonic() - started
        if finding.status != "fail":
            return finding
        self._child.end()  # frees what a failed probe may have left
        if not probe.extra:
            return finding
        means = "Sleep mode works without it."
        return degraded(finding.found, means, finding.remedy, **finding.figures)

    def _ask(self, probe: Probe, timeout_s: float) -> Finding:
        device, size = self._args.device, self._report.size_bytes
        try:
            return self._child.probe(timeout_s, probe.name, device, size)
        except Silence as error:
            return failed(
                str(error),
                "An engine would hang here.",
                "See dmesg and CANN's log; on a slow machine, give it more time with --timeout.",
                timeout_s=timeout_s,
            )
        except Crash as error:
            return failed(str(error), "An engine would end here.", "See dmesg and CANN's log.")
        except (AclMissing, AclError) as error:
            means = "The device cannot be used."
            return failed(str(error), means, _SEE_LOG, **of_call(error))

    def _given_back(self, free_before: int) -> Finding:
        """Whether the device has as much free memory as before, as another process sees it."""
        self._progress("looking at the device")
        try:
            seconds = _LAST_LOOK_S * max(1, self._scale)
            free = self._child.look(seconds, self._args.device)["devices"][0]["free_bytes"]
        except (Silence, Crash, AclMissing, AclError, KeyError):  # KeyError: it has an error
            return failed(
                "the device cannot be asked any more",
                "Another probe has upset it, and no engine could start on it now.",
                "See npu-smi info.",
            )
        missing = free_before - free
        figures = {"free_before_bytes": free_before, "free_after_bytes": free}
        if missing > _NOT_GIVEN_BACK:
            return degraded(
                f"{missing / MIB:.0f} MiB less are free than before",
                "Another process took them meanwhile, or the driver has not got them back.",
                "See npu-smi info for who holds memory.",
                **figures,
            )
        return passed("the device has as much free memory as before", **figures)

    def _within(self, seconds: float) -> float:
        return min(seconds * self._scale, self._end - time.monotonic())

    def _progress(self, text: str) -> None:
        if not self._args.quiet:
            print(text, file=sys.stderr, flush=True)


def _no_ascendcl(error: Exception) -> Finding:
    text = str(error)
    if not isinstance(error, AclMissing):
        remedy = "See npu-smi info and dmesg; in a container, the devices that were given to it."
    elif "ascend_hal" in text:
        remedy = "Install the driver; in a container, mount /usr/local/Ascend/driver."
    elif "has no" in text:
        remedy = "Install CANN 8.1 or newer."
    else:
        remedy = f"Install CANN, and {surroundings.SET_ENV}."
    return failed(text, "Nothing can use an NPU in this shell.", remedy, **of_call(error))


def _ascendcl(soc: str, count: int) -> Finding:
    if count == 0:
        return failed(
            "no visible device",
            "No engine can run.",
            "See npu-smi info; ASCEND_RT_VISIBLE_DEVICES; in a container, the devices that were "
            "given to it.",
        )
    return passed(f"{soc or 'an unknown chip'}; visible devices: {count}")


def _broken_device(device: dict[str, Any]) -> Finding:
    remedy = (
        "The device has no stream left: end other processes on it."
        if device["code"] == NO_RESOURCE
        else _SEE_LOG
    )
    means = "No process can use the device."
    return failed(device["error"], means, remedy, call=device["call"], code=device["code"])
