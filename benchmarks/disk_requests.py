# SPDX-License-Identifier: Apache-2.0
"""As many requests in flight to one disk in three ways: by threads, as backups and images make
them, and by fio (https://github.com/axboe/fio) with threads and with io_uring.

All write and read the same file, which was written before, past the page cache: how fast a disk is
may depend on where a file lies. The ways take turns, ``--cycles`` times. A write ends when the disk
has everything.

    python benchmarks/disk_requests.py --device cuda --dir /mnt/nvme --fio fio --out build/results
"""

import argparse
import json
import statistics
import subprocess
from itertools import product
from pathlib import Path

from bench import report
from bench.machine import Machine
from bench.raw_disk import RawDisk

MIB = 1 << 20
PIECE = 8 * MIB  # DiskBackup::kPiece in csrc/disk/backup.h
IN_FLIGHT = (8, 16)  # of an image, and of a backup with disk_blocks_mib=256
WAYS = ("threads", "fio, threads", "fio, io_uring")


def fio_gb_s(options: argparse.Namespace, file: str, size: int, way: list[str]) -> float:
    common = [f"--filename={file}", f"--filesize={size}", f"--bs={PIECE}", "--direct=1"]
    ends = ["--end_fsync=1", "--group_reporting", "--output-format=json"]
    command = [options.fio, "--name=disk", *common, *way, *ends]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    (moved,) = (job[way] for way in ("read", "write") if job[way]["io_bytes"])
    if job["error"] or moved["io_bytes"] != size:
        raise SystemExit(f"fio moved {moved['io_bytes']} of {size} bytes: {done.stderr}")
    return float(moved["bw_bytes"]) / 1e9


def fio_options(way: str, direction: str, in_flight: int, size: int) -> list[str]:
    """Threads take the file's pieces in turns, as those of ``RawDisk`` do."""
    if way == "fio, io_uring":
        return [f"--rw={direction}", "--ioengine=io_uring", f"--iodepth={in_flight}"]
    threads = ["--ioengine=psync", "--thread", f"--numjobs={in_flight}"]
    parts = [f"--offset_increment={PIECE}", f"--io_size={size // in_flight}"]
    return [f"--rw={direction}:{(in_flight - 1) * PIECE}", *threads, *parts]


def measure(options: argparse.Namespace, size: int) -> dict[str, list[float]]:
    """GB/s by number in flight, way and direction."""
    runs: dict[str, list[float]] = {}
    with RawDisk(options.dir, size, PIECE, max(IN_FLIGHT)) as disk:

        def run(in_flight: int, way: str, direction: str) -> float:
            if way == "threads":
                disk.threads = in_flight
                return disk.write_gb_s() if direction == "write" else disk.read_gb_s()
            return fio_gb_s(options, disk.path, size, fio_options(way, direction, in_flight, size))

        disk.write_gb_s()  # to space that was never written
        turns = product(range(options.cycles), IN_FLIGHT, WAYS, ("write", "read"))
        for _, in_flight, way, direction in turns:
            gb_s = run(in_flight, way, direction)
            runs.setdefault(f"{in_flight}, {way}, {direction}", []).append(gb_s)
    return runs


def rows_of(runs: dict[str, list[float]]) -> list[list[str]]:
    """The table: medians."""
    rows = [["in flight", "write", "read"]]
    for in_flight, way in product(IN_FLIGHT, WAYS):
        both = (runs[f"{in_flight}, {way}, {direction}"] for direction in ("write", "read"))
        speeds = [f"{statistics.median(of):.2f} GB/s" for of in both]
        rows.append([f"{in_flight}, {way}", *speeds])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("npu", "cuda", "sim"), default="npu")
    parser.add_argument("--dir", type=Path, required=True, help="a directory on the disk")
    parser.add_argument("--fio", default="fio", help="the program")
    parser.add_argument("--mib", type=int, default=4096, help="size of the file")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    options = parser.parse_args()
    turn = max(IN_FLIGHT) * PIECE
    size = max(1, options.mib * MIB // turn) * turn
    runs = measure(options, size)
    report.print_table(rows_of(runs))
    if options.out is not None:
        version = subprocess.run([options.fio, "--version"], capture_output=True, text=True)
        result = {
            "machine": Machine.describe_host(options.device),
            "fio": version.stdout.strip(),
            "file_bytes": size,
            "gb_s": runs,
        }
        report.write_json(options.out / "disk_requests.json", result)


if __name__ == "__main__":
    main()
