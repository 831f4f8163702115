# SPDX-License-Identifier: Apache-2.0
"""How much serving slows down while host memory is prepared in the background: steps per second of
a decode with a dense model's shape, with and without preparation in turns.

    python benchmarks/preparing.py --device cuda --out build/results

A step is an eager decode of one token: some hundred small operators that are launched one by one,
and a wait for the result. It depends on both the launching thread and the driver's locks.

Each turn runs all ways, every second turn in reverse order. The share of a way is its steps per
second divided by those without preparation in the same turn. It is the median of the turns, with
quartiles.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench import allocators, build, report
from bench.machine import Machine
from bench.models import MODELS
from bench.tensors import Weights

WAYS = {  # the arguments of prepare(), and whether the allocator is told about steps
    "not": (None, True),
    "by one thread": ({"slowly": True}, True),
    "by many": ({"slowly": False}, True),
    "by one, not told of steps": ({"slowly": True}, False),
    "by many, not told of steps": ({"slowly": False}, False),
}


class Decode:
    """One token through ``layers`` layers of width ``width``."""

    def __init__(self, machine: Machine, layers: int, width: int) -> None:
        self._machine = machine
        make = {"dtype": torch.bfloat16, "device": machine.device}
        self._layers = [torch.randn(width, width, **make) / width for _ in range(layers)]
        self._token = torch.randn(1, width, **make)

    def step(self) -> None:
        hidden = self._token
        for layer in self._layers:
            normal = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)
            hidden = hidden + torch.relu(normal @ layer) @ layer
        hidden.argmax().item()


def seconds_of_steps(camem: Any, decode: Decode, seconds: float, told: bool) -> list[float]:
    took: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        if told:  # like the worker
            camem.step_begins()
        decode.step()
        if told:
            camem.step_ends()
        took.append(time.perf_counter() - start)
    return took


def measure(options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Seconds of each step, for each way and turn."""
    machine = Machine(options.device)
    ours: Any = allocators.make("ours", machine, options.chunk_mib)
    weights = Weights(MODELS[options.model], ours, machine)
    decode = Decode(machine, options.layers, options.width)
    seconds_of_steps(ours.camem, decode, options.seconds, False)  # warms up
    steps: dict[str, list[list[float]]] = {way: [] for way in options.ways}
    for turn in range(options.turns):
        for way in options.ways if turn % 2 == 0 else reversed(options.ways):
            arguments, told = WAYS[way]
            seconds_of_steps(ours.camem, decode, 0.2, told)  # serving has begun
            if arguments is not None:
                ours.camem.prepare(["weights"], **arguments)
            steps[way].append(seconds_of_steps(ours.camem, decode, options.seconds, told))
            ours.camem.release_prepared()
            ours.camem.prepare([])  # waits until everything is freed
    if not weights.kept():
        raise SystemExit("contents were lost")
    return steps


def figures_of(turns: list[list[float]], without: list[list[float]]) -> dict[str, Any]:
    """Figures of a way from the seconds of its steps and of those without preparation, by turn."""
    took = [seconds for turn in turns for seconds in turn]
    centiles = statistics.quantiles(took, n=100, method="inclusive")
    rates = [[len(turn) / sum(turn) for turn in way] for way in (turns, without)]
    shares = [rate / base for rate, base in zip(*rates, strict=True)]
    quartiles = shares * 2  # of a single turn
    if len(shares) > 1:
        quartiles = statistics.quantiles(shares, method="inclusive")[::2]
    return {
        "steps": len(took),
        "steps_per_s": len(took) / sum(took),
        "share": statistics.median(shares),
        "share_quartiles": quartiles,
        "shares": shares,
        "median_s": centiles[49],
        "p99_s": centiles[98],
        "max_s": max(took),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("npu", "cuda", "sim"), default="npu")
    parser.add_argument("--model", default=None, help="model for whose weights memory is prepared")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=None, help="seconds of each way in a turn")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--chunk-mib", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON")
    options = parser.parse_args()
    toy = options.device == "sim"
    options.model = options.model or ("toy" if toy else "qwen2.5-7b")
    options.seconds = options.seconds or (0.5 if toy else 5.0)
    options.width = options.width or (64 if toy else 3584)
    options.chunk_mib = options.chunk_mib or (4 if toy else 64)
    if "not" not in options.ways:
        parser.error("--ways needs 'not', which the others are compared with")
    return options


def main() -> None:
    options = parse()
    if options.device == "cuda":
        build.build()
        os.environ.setdefault("NPU_SIM_HBM_GIB", str(build.device_gib() - 4))
    steps = measure(options)
    figures = {way: figures_of(turns, steps["not"]) for way, turns in steps.items()}
    rows = [["memory is prepared", "steps/s", "share", "median", "99 %", "longest"]]
    for way, of in figures.items():
        low, high = of["share_quartiles"]
        share = f"{of['share'] * 100:.1f} % ({low * 100:.1f} to {high * 100:.1f})"
        times = [f"{of[key] * 1e3:.2f} ms" for key in ("median_s", "p99_s", "max_s")]
        rows.append([way, f"{of['steps_per_s']:.0f}", share, *times])
    report.print_table(rows)
    if options.out is not None:
        summary = {
            "machine": Machine.describe_host(options.device),
            "model": options.model,
            "ways": figures,
        }
        report.write_json(options.out / f"preparing_{options.device}_{options.model}.json", summary)


if __name__ == "__main__":
    main()
