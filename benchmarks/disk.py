# SPDX-License-Identifier: Apache-2.0
"""Sleep to disk and wake from it, as a share of what the disk does in the same process.

Every allocator runs in a new process. Each of its cycles measures the disk too, with the same size
of requests and as many in flight, so that another load of the disk meets both. The page cache is
bypassed, or dropped before each wake; the first cycle is listed apart, because it writes to space
that was never written. The weights change before each sleep, because what a kept file has already
is not written again.

    python benchmarks/disk.py --device cuda --dir /mnt/nvme --peer tms_disk --out build/results
"""

import argparse
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import children
from bench.options import add_options, fill_in_options

MIB = 1 << 20
PIECE = 8 * MIB  # DiskBackup::kPiece in csrc/disk/backup.h
LANE = 2 * PIECE  # of a thread


class HostPeak:
    """The largest resident memory of this process since ``watch`` began, sampled every 2 ms."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        from bench.machine import host_bytes

        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.002):
                self.bytes = max(self.bytes, host_bytes())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.bytes = max(self.bytes, host_bytes())


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one allocator in this process."""
    from bench import allocators
    from bench.machine import Machine, host_bytes
    from bench.models import MODELS
    from bench.raw_disk import RawDisk, drop_page_cache
    from bench.tensors import Weights

    machine = Machine(options.device)
    allocator = allocators.make(
        name, machine, options.chunk_mib, options.dir, options.disk_blocks_mib
    )
    machine.warm_up()
    weights = Weights(MODELS[options.model], allocator, machine)
    size = sum(weight.nbytes for weight in weights.tensors)
    threads = max(1, options.disk_blocks_mib * MIB // LANE)

    rates: dict[str, list[float]] = {"write": [], "sleep": [], "read": [], "wake": []}
    flushes, contents_kept, dropped, peak = [], True, True, HostPeak()
    with RawDisk(options.dir, max(size, PIECE), PIECE, threads) as disk:
        drop_page_cache()
        resident = host_bytes()
        for _ in range(options.cycles):
            weights.change()
            rates["write"].append(disk.write_gb_s())
            time.sleep(options.pause_s)
            with peak.watch():
                start = machine.now()
                allocator.sleep()
                rates["sleep"].append(size / 1e9 / (machine.now() - start))
            start = machine.now()
            os.sync()
            flushes.append(machine.now() - start)
            dropped = drop_page_cache() and dropped
            rates["read"].append(disk.read_gb_s())
            time.sleep(options.pause_s)
            with peak.watch():
                start = machine.now()
                allocator.wake(["weights"])
                rates["wake"].append(size / 1e9 / (machine.now() - start))
            contents_kept = contents_kept and weights.kept()
        direct = disk.direct
    return {
        "weights_bytes": size,
        "threads": threads,
        "raw_direct": direct,
        "page_cache_dropped": dropped,
        "gb_s": rates,
        "flush_after_sleep_s": flushes,
        "host_peak_bytes": max(0, peak.bytes - resident),
        "contents_kept": contents_kept,
        **allocator.figures(),
    }


def rows_of(runs: dict[str, Any]) -> list[list[str]]:
    """The table: medians of the cycles after the first one."""
    from statistics import median

    heading = "allocator,first sleep,later sleeps,of the disk,wake,of the disk,host peak"
    rows = [heading.split(",")]
    for name, run in runs.items():
        if "error" in run:
            rows.append([name, run["error"][:60], *[""] * 5])
            continue
        later = {what: median(rates[1:] or rates) for what, rates in run["gb_s"].items()}
        rows.append(
            [
                name,
                f"{run['gb_s']['sleep'][0]:.2f} GB/s",
                f"{later['sleep']:.2f} GB/s",
                f"{later['sleep'] / later['write'] * 100:.0f} % of {later['write']:.2f}",
                f"{later['wake']:.2f} GB/s",
                f"{later['wake'] / later['read'] * 100:.0f} % of {later['read']:.2f}",
                f"{run['host_peak_bytes'] / MIB:.0f} MiB",
            ]
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--dir", type=Path, required=True, help="a directory on the disk")
    parser.add_argument("--disk-blocks-mib", type=int, default=None)
    parser.add_argument("--ours", default="ours_disk")
    parser.add_argument("--peer", default="", help="tms_disk (CUDA)")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--pause-s", type=float, default=0.5, help="pause between operations")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    toy = fill_in_options(options)
    options.pause_s = 0.0 if toy else options.pause_s
    options.disk_blocks_mib = options.disk_blocks_mib or (32 if toy else 256)
    return options


def main() -> None:
    options = parse()
    if options.child is not None:
        children.end_child(measure(options.child, options))
    from bench import report
    from bench.machine import Machine

    environment = children.environment_for(options.device)
    runs = children.run_each(f"{options.ours},{options.peer}", environment)
    result = {
        "machine": Machine.describe_host(options.device),
        "model": options.model,
        "disk_blocks_mib": options.disk_blocks_mib,
        "runs": runs,
    }
    report.print_table(rows_of(runs))
    if options.out is not None:
        stem = f"disk_{options.device}_{options.model}"
        report.write_json(options.out / f"{stem}.json", result)
    children.check(runs)


if __name__ == "__main__":
    main()
