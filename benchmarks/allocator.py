# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake of weights and KV cache, compared with other allocators and the link's peak.

Every allocator runs in a new process, which measures the link first. ``--device cuda`` runs the
compiled allocator over CUDA. ``sim`` runs it at toy size under npu-sim and only checks contents,
because times of host memory mean nothing.

    python benchmarks/allocator.py --device cuda --peer cumem,tms,tms_retain --out build/results
"""

import argparse
import subprocess
import sys
import time
from typing import Any

from bench import children
from bench.options import add_options, fill_in_options

GIB = 1 << 30
MIB = 1 << 20


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one allocator in this process."""
    from bench import allocators
    from bench.machine import Machine, host_bytes, summary
    from bench.models import MODELS
    from bench.tensors import Weights, kv_cache

    machine = Machine(options.device)
    peak = machine.link_peak(options.link_mib * MIB)
    allocator = allocators.make(name, machine, options.chunk_mib)
    machine.warm_up()
    allocator.sleep()  # of nothing, so that what the allocator loads counts as context
    context, resident = machine.used(), host_bytes()

    weights = Weights(MODELS[options.model], allocator, machine)
    cache = kv_cache(options.kv_blocks, options.kv_block_mib, allocator, machine)
    awake = machine.used()
    start = machine.now()
    allocator.prepare()
    prepare_s = machine.now() - start

    sleeps, wakes, kv_wakes, left, contents_kept = [], [], [], [], True
    host = 0
    for _ in range(options.cycles):
        time.sleep(options.pause_s)
        start = machine.now()
        allocator.sleep()
        sleeps.append(machine.now() - start)
        left.append(machine.used() - context)
        host = max(host, host_bytes() - resident)
        time.sleep(options.pause_s)
        start = machine.now()
        allocator.wake(["weights"])
        wakes.append(machine.now() - start)
        start = machine.now()
        allocator.wake(["kv_cache"])
        kv_wakes.append(machine.now() - start)
        contents_kept = contents_kept and weights.kept()
        cache[0].fill_(1)
    result = {
        "weights_bytes": sum(weight.nbytes for weight in weights.tensors),
        "tensors": len(weights.tensors),
        "kv_bytes": sum(block.nbytes for block in cache),
        "link_peak_gb_s": peak,
        "context_bytes": context,
        "awake_bytes": awake - context,
        "left_bytes": max(left),
        "host_bytes": host,
        "prepare_s": prepare_s,
        "first_sleep_s": sleeps[0],
        "later_sleep_s": summary(sleeps[1:]),
        "wake_weights_s": summary(wakes),
        "wake_kv_s": summary(kv_wakes),
        "sleeps_s": sleeps,
        "wakes_s": wakes,
        "kv_wakes_s": kv_wakes,
        "contents_kept": contents_kept,
        **allocator.figures(),
    }
    if isinstance(allocator, allocators.Ours):
        result["discard_all_s"] = discard_all(allocator, machine, options)
    return result


def discard_all(allocator: Any, machine: Any, options: argparse.Namespace) -> dict[str, float]:
    """Seconds to free everything without a copy, a lower bound for every sleep."""
    from bench.machine import summary

    seconds = []
    for _ in range(3):
        time.sleep(options.pause_s)
        start = machine.now()
        allocator.discard_all()
        seconds.append(machine.now() - start)
        time.sleep(options.pause_s)
        allocator.wake(["weights", "kv_cache"])
    return summary(seconds)


def touch_host(size: int) -> None:
    """Use this much host memory once and free it.

    A hypervisor provides a virtual machine's memory at the first touch. That is slower than what is
    measured here, and would slow down the first process.
    """
    code = f"import numpy; numpy.ones({size}, numpy.uint8)"
    subprocess.run([sys.executable, "-c", code], check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--peer", default="", help="some of cumem,tms,tms_retain (CUDA)")
    parser.add_argument("--ours", default="ours,ours_on_demand,ours_skip_unchanged")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--pause-s", type=float, default=0.5, help="pause between operations")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    toy = fill_in_options(options)
    options.pause_s = 0.0 if toy else options.pause_s
    return options


def main() -> None:
    options = parse()
    if options.child is not None:
        children.end_child(measure(options.child, options))
    from bench import report
    from bench.machine import Machine
    from bench.models import MODELS

    environment = children.environment_for(options.device)
    if options.device == "cuda":
        touch_host(min(3 * MODELS[options.model].bytes(), 90 * GIB))
    runs = children.run_each(f"{options.ours},{options.peer}", environment)
    result = {
        "machine": Machine.describe_host(options.device),
        "model": options.model,
        "weights_bytes": MODELS[options.model].bytes(),
        "kv_bytes": options.kv_blocks * options.kv_block_mib * MIB,
        "chunk_mib": options.chunk_mib,
        "runs": runs,
    }
    report.print_table(report.allocator_rows(result))
    if options.out is not None:
        stem = f"allocator_{options.device}_{options.model}"
        report.write_json(options.out / f"{stem}.json", result)
        if options.device != "sim":
            report.draw_allocators(options.out / f"{stem}.png", result)
    children.check(runs)


if __name__ == "__main__":
    main()
