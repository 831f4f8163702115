# SPDX-License-Identifier: Apache-2.0
"""Weights from a saved image, and the same bytes from safetensors as vLLM's loader reads them.

Both files are read as often as ``--cycles`` says, in turns and with the page cache dropped before,
and beside them a file of the same size past the page cache: the disk's own speed. A start has more
to do than this: processes, graphs, and with a checkpoint the sharding and fusing of its tensors.

    python benchmarks/image.py --device cuda --dir /mnt/nvme --out build/results
"""

import argparse
import hashlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import report
from bench.machine import Machine
from bench.models import MODELS
from bench.options import add_options, fill_in_options
from bench.raw_disk import RawDisk, drop_page_cache

ROOT = Path(__file__).resolve().parents[1]


def save_image(path: Path, weights: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Returns what fills the weights again."""
    sys.path.append(str(ROOT))
    from vllm_sleep_ascend.rank.image import pieces, tensors

    _, spans, size = tensors.laid_out({name: tensors.held(t) for name, t in weights.items()})
    checksums = pieces.write(path, spans, size)
    return lambda: pieces.read(path, spans, size, checksums)


def save_safetensors(path: Path, weights: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The same, one tensor after the other from mapped memory, as vLLM does by default."""
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
    content = _digest(weights)
    size = sum(tensor.nbytes for tensor in weights.values())
    fills = {
        "image": save_image(folder / "weights", weights),
        "safetensors": save_safetensors(folder / "model.safetensors", weights),
    }
    rates: dict[str, list[float]] = {"disk": [], **{name: [] for name in fills}}
    kept, dropped = True, True
    with RawDisk(folder, size, 8 << 20, 8) as disk:
        disk.write_gb_s()
        for _ in range(options.cycles):
            dropped = drop_page_cache() and dropped
            rates["disk"].append(disk.read_gb_s())
            for name, fill in fills.items():
                for tensor in weights.values():
                    tensor.zero_()
                dropped = drop_page_cache() and dropped
                start = machine.now()
                fill()
                rates[name].append(size / 1e9 / (machine.now() - start))
                kept = kept and _digest(weights) == content
    return {
        "weights_bytes": size,
        "page_cache_dropped": dropped,
        "gb_s": rates,
        "contents_kept": kept,
    }


def _digest(weights: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in weights.values():
        total.update(tensor.cpu().view(torch.uint8).numpy().data)
    return total.hexdigest()


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
    medians = {name: statistics.median(rates) for name, rates in run["gb_s"].items()}
    rows = [[name, f"{rate:.2f} GB/s"] for name, rate in medians.items()]
    report.print_table([["read from", "speed"], *rows])
    if options.out is not None:
        machine = Machine.describe_host(options.device)
        result = {"machine": machine, "model": options.model, **run}
        report.write_json(options.out / f"image_{options.device}_{options.model}.json", result)
    if not run["contents_kept"]:
        raise SystemExit("contents were lost")


if __name__ == "__main__":
    main()
