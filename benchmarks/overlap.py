# SPDX-License-Identifier: Apache-2.0
"""The switch from model A to model B on one device, in two processes: serial, and overlapped, where
B's wake uses the memory that A's sleep frees, chunk by chunk.

Both models have weights and a KV cache; the device cannot hold both. When overlapped, the link
carries A's weights to the host and B's weights to the device at the same time.

    python benchmarks/overlap.py --device cuda --out build/results
"""

import argparse
import json
import os
import statistics
import sys
import time

from bench.engine import Engine
from bench.options import add_options, fill_in_options

GIB = 1 << 30
MIB = 1 << 20
TAGS = ["weights", "kv_cache"]


def serve(options: argparse.Namespace) -> None:
    """A child: allocates, sleeps, and then executes commands."""
    from bench import allocators
    from bench.machine import Machine
    from bench.models import MODELS
    from bench.tensors import Weights, kv_cache

    machine = Machine(options.device)
    allocator = allocators.make("ours", machine, options.chunk_mib)
    weights = Weights(MODELS[options.model], allocator, machine)
    cache = kv_cache(options.kv_blocks, options.kv_block_mib, allocator, machine)
    allocator.prepare()
    allocator.sleep()
    machine.torch.empty_cache()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        start = time.monotonic()
        if line == "sleep\n":
            allocator.sleep()
        elif line == "wake\n":
            allocator.wake(TAGS, 120.0)
        end = time.monotonic()
        kept = True
        if line == "check\n":
            kept = weights.kept()
            cache[0].fill_(1)
            machine.synchronize()
        print(json.dumps({"start": start, "end": end, "kept": kept}), flush=True)


def switch(a: Engine, b: Engine, overlapped: bool) -> dict[str, float]:
    """Seconds of A's sleep, of B's wake, and of the whole switch."""
    if overlapped:
        b.tell("wake")
        a.tell("sleep")
        slept, woke = a.answer(), b.answer()
    else:
        slept = a.do("sleep")
        woke = b.do("wake")
    return {
        "sleep_s": slept["end"] - slept["start"],
        "wake_s": woke["end"] - woke["start"],
        "total_s": max(slept["end"], woke["end"]) - min(slept["start"], woke["start"]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--cycles", type=int, default=6, help="switches of each kind")
    parser.add_argument("--pause-s", type=float, default=0.5, help="pause between switches")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    fill_in_options(options)
    return options


def main() -> None:
    options = parse()
    if options.child is not None:
        serve(options)
        return
    from bench import build, report
    from bench.machine import Machine
    from bench.models import MODELS

    environment = dict(os.environ)
    kv = options.kv_blocks * options.kv_block_mib * MIB
    one = MODELS[options.model].bytes() + kv
    if options.device == "cuda":
        build.build()
        environment.setdefault("NPU_SIM_HBM_GIB", str(min(build.device_gib() - 4, one * 1.5 / GIB)))
    if options.device == "sim":
        environment["NPU_SIM_HBM_GIB"] = str(one * 1.95 / GIB)
    engines = [Engine(name, environment) for name in ("a", "b")]
    engines[0].do("wake")
    runs: dict[str, list[dict[str, float]]] = {"serial": [], "overlapped": []}
    awake, kept = 0, True
    for kind in ("serial", "overlapped") * options.cycles:
        time.sleep(0 if options.device == "sim" else options.pause_s)
        asleep = 1 - awake
        runs[kind].append(switch(engines[awake], engines[asleep], kind == "overlapped"))
        awake = asleep
        kept = kept and engines[awake].do("check")["kept"]
    for engine in engines:
        engine.close()
    median = {
        kind: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for kind, measured in runs.items()
    }
    rows = [["switch", "A sleeps", "B wakes", "together"]]
    for kind, run in median.items():
        rows.append([kind, *(f"{run[key] * 1e3:.0f} ms" for key in run)])
    report.print_table(rows)
    ratio = median["overlapped"]["total_s"] / median["serial"]["total_s"]
    print(f"overlapped / serial: {ratio:.3f}")
    result = {
        "machine": Machine.describe_host(options.device),
        "model": options.model,
        "weights_bytes": MODELS[options.model].bytes(),
        "kv_bytes": kv,
        "device_gib": environment.get("NPU_SIM_HBM_GIB"),
        "ratio": ratio,
        "median": median,
        "runs": runs,
        "contents_kept": kept,
    }
    if options.out is not None:
        report.write_json(options.out / f"overlap_{options.device}_{options.model}.json", result)
    if not kept:
        raise SystemExit("contents were lost")


if __name__ == "__main__":
    main()
