# SPDX-License-Identifier: Apache-2.0
"""How long requests wait for more models than fit, by several ways to share a device.

The proxy's own choice (``vllm_sleep_ascend.proxy.choice``) runs in virtual time over synthetic
traces: each model has bursts of requests, and pauses between them. ``fit`` keeps as many models
awake as fit by bytes; ``LRU by bytes`` does so too, but as a cache would: no turns, and those go
that were used least recently; ``one at a time`` has that one sleep; ``stop and start`` ends
processes in place of sleeps, and starts them in place of wakes. Needs no device.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from bench.virtual import Device, Model, Outcome, Request, choose, least_recently_used, quantile

GB = 10**9
# Names, weights and share of the device in GB, of models as they are served.
MODELS = (
    ("0.6B", 1.2, 6),
    ("4B", 8, 16),
    ("7B", 15, 24),
    ("8B", 16, 26),
    ("14B", 29, 40),
    ("32B int8", 34, 52),
)
REMAP_S = 0.1  # of a wake, for the KV cache and the scheduler
STOP_S = 3.0  # of a process, until its memory is free
LOAD_GB_S = 2.0  # from disk, at a start
START_S = 25.0  # of a start besides, with graphs
BURST_S, PAUSE_S = 60.0, 240.0  # mean
RATE = 0.5  # requests a second in a burst
REQUEST_S = 4.0  # mean


def models(link_gb_s: float) -> list[Model]:
    return [
        Model(name, round(share * GB), weights / link_gb_s, weights / link_gb_s + REMAP_S)
        for name, weights, share in MODELS
    ]


def with_starts(model: Model) -> Model:
    weights = next(weights for name, weights, _ in MODELS if name == model.name)
    return replace(model, sleep_s=STOP_S, wake_s=START_S + weights / LOAD_GB_S)


def trace(seed: int, seconds: float) -> list[Request]:
    """Requests in bursts, independent for each model."""
    chance = random.Random(seed)
    found = []
    for name, _, _ in MODELS:
        time = chance.expovariate(1 / PAUSE_S)
        while time < seconds:
            end = min(seconds, time + chance.expovariate(1 / BURST_S))
            while (time := time + chance.expovariate(RATE)) < end:
                found.append(Request(time, name, chance.expovariate(1 / REQUEST_S)))
            time = end + chance.expovariate(1 / PAUSE_S)
    return sorted(found, key=lambda request: request.at)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device-gb", type=float, default=64)
    parser.add_argument("--link-gbps", type=float, default=25, help="GB/s to and from the device")
    parser.add_argument("--turn-s", type=float, default=2.0)
    parser.add_argument("--hours", type=float, default=1.0, help="of each trace")
    parser.add_argument("--seeds", type=int, default=5, help="traces")
    parser.add_argument("--out", type=Path, help="a folder for schedule.json")
    args = parser.parse_args()
    sleeping = models(args.link_gbps)
    starting = [with_starts(model) for model in sleeping]
    ways = {
        "fit": (sleeping, None, choose, args.turn_s),
        "LRU by bytes": (sleeping, None, least_recently_used, 0.0),
        "one at a time (LRU)": (sleeping, 1, choose, args.turn_s),
        "stop and start": (starting, 1, choose, args.turn_s),
        "stop and start by bytes": (starting, None, choose, args.turn_s),
        "fit, turns of 10 s": (sleeping, None, choose, 10.0),
        "one at a time, turns of 10 s": (sleeping, 1, choose, 10.0),
    }
    capacity, seconds = round(args.device_gb * GB), 3600 * args.hours
    traces = [trace(seed, seconds) for seed in range(args.seeds)]
    print("| way | requests | switches | wait p50 | p95 | longest | lost in switching |")
    print("|---|---|---|---|---|---|---|")
    result = {}
    for way, (there, max_awake, by, turn_s) in ways.items():
        devices = [Device(there, capacity, max_awake, turn_s, choose=by) for _ in traces]
        outcomes = [device.serve(t) for device, t in zip(devices, traces, strict=True)]
        result[way] = figures(outcomes)
        print(row(way, result[way]))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {**vars(args), "out": str(args.out)}
        text = json.dumps({"settings": settings, "ways": result}, indent=1)
        (args.out / "schedule.json").write_text(text + "\n")


def figures(outcomes: list[Outcome]) -> dict[str, float]:
    waits = [wait for outcome in outcomes for wait in outcome.waits]
    return {
        "requests": len(waits),
        "switches": sum(outcome.wakes for outcome in outcomes),
        "p50_s": quantile(waits, 0.5),
        "p95_s": quantile(waits, 0.95),
        "longest_s": max(waits),
        "switching_s": sum(outcome.switching_s for outcome in outcomes),
        "seconds": sum(outcome.end for outcome in outcomes),
        "most_bytes": max(outcome.most_bytes for outcome in outcomes),
        "most_awake": max(outcome.most_awake for outcome in outcomes),
    }


def row(way: str, f: dict[str, float]) -> str:
    lost = f"{f['switching_s']:.0f} s ({f['switching_s'] / f['seconds']:.1%})"
    waits = " | ".join(f"{f[name]:.2f} s" for name in ("p50_s", "p95_s", "longest_s"))
    return f"| {way} | {f['requests']:.0f} | {f['switches']:.0f} | {waits} | {lost} |"


if __name__ == "__main__":
    main()
