# SPDX-License-Identifier: Apache-2.0
"""Device memory during the phases of a run, as a table and as a picture."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 1 << 20
_EVERY_S = 0.02


class MemoryLog:
    """A thread that samples the device bytes used by all processes."""

    def __init__(self, free_and_total: Callable[[], tuple[int, int]]) -> None:
        self._free_and_total = free_and_total
        self.total_bytes = free_and_total()[1]
        self.samples: list[tuple[float, int]] = []  # time in seconds, bytes
        threading.Thread(target=self._sample, daemon=True).start()

    def used_bytes(self) -> int:
        free, total = self._free_and_total()
        return total - free

    def _sample(self) -> None:
        while True:
            self.samples.append((time.time(), self.used_bytes()))
            time.sleep(_EVERY_S)

    def __getstate__(self) -> dict[str, Any]:
        return {"total_bytes": self.total_bytes, "samples": list(self.samples)}


class Phases:
    """The phases of a run, and the bytes in use on each device at the end of each phase."""

    def __init__(self, used_bytes: Callable[[], list[int]]) -> None:
        self._used_bytes = used_bytes
        self.records: list[dict[str, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.time()
        yield
        end = time.time()
        self.records.append(
            {"name": name, "start": start, "end": end, "used_bytes": self._used_bytes()}
        )

    def add_peaks(self, logs: Sequence[MemoryLog]) -> None:
        """Add the peak bytes in use on each device during each phase."""
        for record in self.records:
            span = record["start"], record["end"]
            record["peak_bytes"] = [
                max([after, *(n for at, n in log.samples if span[0] <= at <= span[1])])
                for after, log in zip(record["used_bytes"], logs, strict=True)
            ]

    def print_table(self) -> None:
        print("MiB in use on each device:")
        print("| phase         | seconds |      peak      | afterwards")
        for record in self.records:
            peak, after = (
                ", ".join(f"{n / MIB:6.1f}" for n in record[name])
                for name in ("peak_bytes", "used_bytes")
            )
            seconds = record["end"] - record["start"]
            print(f"| {record['name']:13} | {seconds:7.2f} | {peak:14} | {after}")


def draw(path: Path, logs: Sequence[MemoryLog], records: Sequence[dict[str, Any]]) -> None:
    """Draw a row for each device: memory in use over time, with the phases in the background."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import colormaps, pyplot

    first = records[0]["start"]
    names = list(dict.fromkeys(record["name"] for record in records))
    colours = dict(zip(names, colormaps["Pastel1"](range(len(names))), strict=True))
    figure, rows = pyplot.subplots(
        len(logs), squeeze=False, sharex=True, figsize=(10, 1.2 + 2.2 * len(logs))
    )
    for device, (axes, log) in enumerate(zip(rows[:, 0], logs, strict=True)):
        for record in records:
            span = record["start"] - first, record["end"] - first
            axes.axvspan(*span, color=colours[record["name"]], linewidth=0)
        times, used = zip(*[sample for sample in log.samples if sample[0] >= first], strict=True)
        axes.plot([at - first for at in times], [n / MIB for n in used], color="black", linewidth=1)
        axes.axhline(log.total_bytes / MIB, color="black", linestyle=":", linewidth=1)
        axes.set_ylabel(f"device {device}\nMiB in use")
        axes.set_ylim(bottom=0)
    rows[-1, 0].set_xlabel("seconds")
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(patches, names, loc="upper center", ncols=len(names))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")
