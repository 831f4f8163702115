# SPDX-License-Identifier: Apache-2.0
"""Several ranks that sleep and wake at the same time over one link or several, each a process with
its own model: their total speed, compared with plain pinned copies by as many processes.

    python benchmarks/parallel.py --device cuda --ranks 1,2,4 --devices 1 --out build/results

Rank r uses device r modulo ``--devices``: with one device all share its link.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.engine import Engine

GIB = 1 << 30
MIB = 1 << 20
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES"}
NPU_VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
WAYS = {"sleep": "d2h", "wake": "h2d"}


def serve(options: argparse.Namespace) -> None:
    """A child: one rank, which executes commands, one per line."""
    import torch
    from bench import allocators
    from bench.machine import Machine
    from bench.models import MODELS
    from bench.tensors import Weights

    machine = Machine(options.device)
    allocator = allocators.make("ours", machine, options.chunk_mib)
    weights = Weights(MODELS[options.model], allocator, machine)
    size = options.copy_mib * MIB
    host = torch.empty(size, dtype=torch.uint8, pin_memory=options.device != "sim")
    device = torch.ones(size, dtype=torch.uint8, device=machine.device)
    copies = {"d2h": (host, device), "h2d": (device, host)}
    machine.synchronize()
    allocator.prepare()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command, kept = line.strip(), True
        machine.synchronize()
        start = time.monotonic()
        if command == "sleep":
            allocator.sleep()
        elif command == "wake":
            allocator.wake(["weights"], 60.0)
        elif command == "check":
            kept = weights.kept()
        else:
            target, source = copies[command]
            for _ in range(options.copies):
                target.copy_(source, non_blocking=True)
        machine.synchronize()
        times = {"start": start, "end": time.monotonic()}
        print(json.dumps({**times, "kept": kept, **allocator.figures()}), flush=True)


def together(engines: list[Engine], command: str) -> float:
    """Seconds from the first start to the last end."""
    for engine in engines:
        engine.tell(command)
    answers = [engine.answer() for engine in engines]
    return max(a["end"] for a in answers) - min(a["start"] for a in answers)


def measure(engines: list[Engine], options: argparse.Namespace) -> dict[str, Any]:
    """Medians of ``--cycles`` cycles: GB/s of all ranks together."""
    together(engines, "sleep")
    together(engines, "wake")
    # torch allocates a little more than the weights' size, and all of it is copied. It was
    # prepared, so it is page-locked.
    backup = engines[0].do("check")["pinned_bytes"]
    copied = options.copies * options.copy_mib * MIB
    runs: dict[str, list[float]] = {name: [] for name in ("sleep", "wake", "d2h", "h2d")}
    for _ in range(options.cycles):
        for command, rates in runs.items():
            size = backup if command in WAYS else copied
            rates.append(len(engines) * size / 1e9 / together(engines, command))
    medians = {f"{name}_gb_s": statistics.median(rates) for name, rates in runs.items()}
    shares = {
        f"{name}_share": medians[f"{name}_gb_s"] / medians[f"{way}_gb_s"]
        for name, way in WAYS.items()
    }
    return {"backup_bytes": backup, **medians, **shares, "runs": runs}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("npu", "cuda", "sim"), default="npu")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks to measure")
    parser.add_argument("--devices", type=int, default=1, help="devices that the ranks share")
    parser.add_argument("--model", default=None, help="model of each rank: qwen2.5-7b or toy")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--chunk-mib", type=int, default=None)
    parser.add_argument("--copy-mib", type=int, default=None, help="size of a plain pinned copy")
    parser.add_argument("--copies", type=int, default=None, help="plain copies of each rank")
    parser.add_argument("--link-gbps", type=float, default=0.2, help="of each simulated device")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    toy = options.device == "sim"
    options.ranks = [int(count) for count in options.ranks.split(",")]
    options.model = options.model or ("toy" if toy else "qwen2.5-7b")
    options.chunk_mib = options.chunk_mib or (4 if toy else 64)
    options.copy_mib = options.copy_mib or (8 if toy else 512)
    options.copies = options.copies or (4 if toy else 20)
    return options


def environment_of(rank: int, options: argparse.Namespace, weights: int) -> dict[str, str]:
    """Each process sees its only device as device 0."""
    from bench import build

    environment = dict(os.environ)
    environment[VISIBLE.get(options.device, NPU_VISIBLE)] = str(rank % options.devices)
    sharing = -(-max(options.ranks) // options.devices)
    if options.device == "sim":
        environment["NPU_SIM_DEVICES"] = str(options.devices)
        environment["NPU_SIM_HBM_GIB"] = str(sharing * (weights / GIB + 0.25))
        environment["NPU_SIM_LINK_GBPS"] = str(options.link_gbps)
    if options.device == "cuda":
        environment.setdefault("NPU_SIM_HBM_GIB", str(build.device_gib() - 4))
    return environment


def main() -> None:
    options = parse()
    if options.child is not None:
        serve(options)
        return
    from bench import build, report
    from bench.machine import Machine
    from bench.models import MODELS

    if options.device == "cuda":
        build.build()
    weights = MODELS[options.model].bytes()
    engines = [
        Engine(str(rank), environment_of(rank, options, weights))
        for rank in range(max(options.ranks))
    ]
    results = {count: measure(engines[:count], options) for count in options.ranks}
    kept = all(engine.do("check")["kept"] for engine in engines)
    for engine in engines:
        engine.close()
    rows = [["ranks", "sleep", "plain copies", "share", "wake", "plain copies", "share"]]
    for count, result in results.items():
        cells = [str(count)]
        for name, way in WAYS.items():
            cells += [f"{result[f'{name}_gb_s']:.2f} GB/s", f"{result[f'{way}_gb_s']:.2f} GB/s"]
            cells.append(f"{result[f'{name}_share'] * 100:.0f} %")
        rows.append(cells)
    report.print_table(rows)
    summary = {
        "machine": Machine.describe_host(options.device),
        "model": options.model,
        "weights_bytes": weights,
        "devices": options.devices,
        "link_gbps": options.link_gbps if options.device == "sim" else None,
        "ranks": results,
        "contents_kept": kept,
    }
    if options.out is not None:
        name = f"parallel_{options.device}_{options.devices}_{options.model}.json"
        report.write_json(options.out / name, summary)
    if not kept:
        raise SystemExit("contents were lost")


if __name__ == "__main__":
    main()
