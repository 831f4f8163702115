# SPDX-License-Identifier: Apache-2.0
"""Weights saved as an image and read from it, and the same bytes from safetensors as vLLM's loader
reads them.

Each cycle also writes and reads a file of the same size without an image, past the page cache, with
requests of the same size and as many in flight: the disk's own speed. Both are new files. The page
cache is dropped before each read, and a write ends when the disk has everything. A start has more
to do than this: processes, graphs, and with a checkpoint the sharding and fusing of its tensors.

    python benchmarks/image.py --device cuda --dir /mnt/nvme --out build/results
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import report
from bench.machine import MIB, Machine
from bench.models import MODELS
from bench.options import add_options, fill_in_options
from bench.raw_disk import RawDisk, drop_page_cache

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from vllm_sleep_ascend.rank.image import pieces, tensors  # noqa: E402

if not hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11
    torch.accelerator.empty_host_cache = torch._C._host_emptyCache

Weights = dict[str, torch.Tensor]


class Image:
    """A rank's file of an image."""

    def __init__(self, path: Path, weights: Weights) -> None:
        self._path = path
        held = {name: tensors.held(tensor) for name, tensor in weights.items()}
        _, self._spans, self._size = tensors.laid_out(held)
        self._checksums: list[str] = []

    def save(self) -> None:
        self._checksums = pieces.write(self._path, self._spans, self._size)

    def fill(self) -> None:
        pieces.read(self._path, self._spans, self._size, self._checksums)


def checksums(weights: Weights) -> list[int]:
    """Sums of parts in which each element counts by its position."""
    sums = []
    for tensor in weights.values():
        for part in tensor.view(torch.int16).flatten().split(16 * MIB):
            positions = torch.arange(1, part.numel() + 1, device=part.device)
            sums.append(int((part * positions).sum()))
    return sums


def save_safetensors(path: Path, weights: Weights) -> Callable[[], None]:
    """Returns what fills the weights again: one tensor after the other from mapped memory, as vLLM
    does by default."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(weights, path)

    def fill() -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                weights[name].copy_(file.get_tensor(name))

    return fill


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """GB/s of every cycle."""
    machine = Machine(options.device)
    weights = {
        str(number): torch.empty(shape, dtype=torch.bfloat16, device=machine.device)
        for number, shape in enumerate(MODELS[options.model].shapes())
    }
    for tensor in weights.values():
        tensor.view(torch.int16).random_(-3000, 3000)
    content = checksums(weights)
    size = sum(tensor.nbytes for tensor in weights.values())
    path = folder / "weights"
    image = Image(path, weights)
    rates: dict[str, list[float]] = {}
    kept, dropped = True, True

    def timed(name: str, work: Callable[[], None]) -> None:
        start = machine.now()
        work()
        rates.setdefault(name, []).append(size / 1e9 / (machine.now() - start))

    def read(name: str, fill: Callable[[], None]) -> None:
        nonlocal kept, dropped
        for tensor in weights.values():
            tensor.zero_()
        dropped = drop_page_cache() and dropped
        timed(name, fill)
        kept = checksums(weights) == content and kept

    fill_from_safetensors = save_safetensors(folder / "model.safetensors", weights)
    for _ in range(options.cycles):
        path.unlink(missing_ok=True)
        drop_page_cache()
        with RawDisk(folder, size, pieces.PIECE, pieces.THREADS) as disk:
            rates.setdefault("disk, write", []).append(disk.write_gb_s())
            timed("image, save", image.save)
            dropped = drop_page_cache() and dropped
            rates.setdefault("disk, read", []).append(disk.read_gb_s())
        read("image", image.fill)
        read("safetensors", fill_from_safetensors)
    return {
        "weights_bytes": size,
        "threads": pieces.THREADS,
        "page_cache_dropped": dropped,
        "gb_s": rates,
        "contents_kept": kept,
    }


def rows_of(rates: dict[str, list[float]]) -> list[list[str]]:
    """The table: medians of the cycles after the first one."""
    later = {name: statistics.median(of[1:] or of) for name, of in rates.items()}
    rows = [["", "speed", "of the disk"]]
    for name, disk in (
        ("image, save", "disk, write"),
        ("image", "disk, read"),
        ("safetensors", "disk, read"),
    ):
        share = f"{later[name] / later[disk] * 100:.0f} % of {later[disk]:.2f}"
        rows.append([name, f"{later[name]:.2f} GB/s", share])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--dir", type=Path, required=True, help="a directory on the disk")
    parser.add_argument("--cycles", type=int, default=5)
    options = parser.parse_args()
    fill_in_options(options)
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        run = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    report.print_table(rows_of(run["gb_s"]))
    if options.out is not None:
        machine = Machine.describe_host(options.device)
        result = {"machine": machine, "model": options.model, **run}
        report.write_json(options.out / f"image_{options.device}_{options.model}.json", result)
    if not run["contents_kept"]:
        raise SystemExit("contents were lost")


if __name__ == "__main__":
    main()
