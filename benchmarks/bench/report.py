# SPDX-License-Identifier: Apache-2.0
"""Results as a table, JSON and a picture."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table; the first one is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the result, with the command line that is running."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": shlex.join(["python", *sys.argv]), **result}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


def allocator_rows(result: dict[str, Any]) -> list[list[str]]:
    heading = (
        "allocator,first sleep,later sleeps,wake weights,wake KV,left on device,host / weights"
    )
    rows = [heading.split(",")]
    for name, run in result["runs"].items():
        if "error" in run:
            rows.append([name, run["error"][:60], *[""] * 5])
            continue
        weights, peak = run["weights_bytes"], run["link_peak_gb_s"]

        def rate(seconds: float, way: str, weights: int = weights, peak: Any = peak) -> str:
            speed = weights / 1e9 / seconds
            return f"{seconds * 1e3:.0f} ms, {speed:.1f} GB/s ({speed / peak[way] * 100:.1f} %)"

        rows.append(
            [
                name,
                rate(run["first_sleep_s"], "d2h"),
                rate(run["later_sleep_s"]["median"], "d2h"),
                rate(run["wake_weights_s"]["median"], "h2d"),
                _spread(run["wake_kv_s"]),
                f"{run['left_bytes'] / GIB:.3f} GiB",
                f"{run['host_bytes'] / weights:.3f}",
            ]
        )
    return rows


def _spread(seconds: dict[str, float]) -> str:
    low, middle, high = (seconds[key] * 1e3 for key in ("min", "median", "max"))
    return f"{middle:.1f} ms ({low:.1f} to {high:.1f})"


def draw_allocators(path: Path, result: dict[str, Any]) -> None:
    """Draw speeds relative to the link's peak in the same process, and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {name: run for name, run in result["runs"].items() if "error" not in run}
    phases = (
        ("first sleep", "d2h", lambda run: run["first_sleep_s"]),
        ("later sleeps", "d2h", lambda run: run["later_sleep_s"]["median"]),
        ("wake weights", "h2d", lambda run: run["wake_weights_s"]["median"]),
    )
    figure, (shares, times) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    width = 0.8 / len(runs)
    for number, (name, run) in enumerate(runs.items()):
        places = [phase + number * width for phase in range(len(phases))]
        seconds = [get(run) for _, _, get in phases]
        peaks = [run["link_peak_gb_s"][way] for _, way, _ in phases]
        percent = [
            run["weights_bytes"] / 1e9 / second / peak * 100
            for second, peak in zip(seconds, peaks, strict=True)
        ]
        shares.bar(places, percent, width, label=name)
        times.bar(places, seconds, width, label=name)
    for axes in (shares, times):
        middle = 0.4 - width / 2
        axes.set_xticks([phase + middle for phase in range(len(phases))])
        axes.set_xticklabels([label for label, _, _ in phases])
    shares.axhline(100, color="grey", linewidth=0.8)
    shares.set_ylabel("% of the link's peak")
    times.set_ylabel("seconds (log scale)")
    times.set_yscale("log")
    shares.legend(fontsize=8)
    gib = result["weights_bytes"] / GIB
    figure.suptitle(f"{result['machine']['device']}, {result['model']}: {gib:.1f} GiB of weights")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def timeline_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["phase", "seconds", "device at its end", "host", "copied"]]
    for phase in result["phases"]:
        seconds = f"{phase['end_s'] - phase['start_s']:.3f}"
        last = result["samples"]["s"].index(phase["end_s"])
        held = (result["samples"][figure][last] / GIB for figure in ("device", "host", "copied"))
        rows.append([phase["name"], seconds, *(f"{gib:.3f} GiB" for gib in held)])
    return rows


_DEVICE, _HOST, _QUIET = "#1f4e8c", "#b5651d", "#555555"
_WHERE = {
    "cuda": "AscendCL over CUDA on one {device}, not an NPU",
    "npu": "{device}",
    "sim": "{device}: its seconds say nothing about an NPU",
}


def draw_timeline(path: Path, result: dict[str, Any]) -> None:
    """Draw device memory, host memory and the link's speed over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples, phases = result["samples"], result["phases"]
    seconds, device_gib, host_gib = (
        samples["s"],
        *([size / GIB for size in samples[figure]] for figure in ("device", "host")),
    )
    pyplot.rcParams.update({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (device, host, link) = pyplot.subplots(
        3, 1, sharex=True, figsize=(8.6, 5.2), height_ratios=(1.3, 1, 1), layout="constrained"
    )
    device.fill_between(seconds, device_gib, color=_DEVICE, alpha=0.25, linewidth=0)
    device.plot(seconds, device_gib, color=_DEVICE, linewidth=1.3)
    host.plot(seconds, host_gib, color=_HOST, linewidth=1.3)
    host.fill_between(seconds, _asleep_gib(result), color=_HOST, alpha=0.25, linewidth=0)

    for phase in phases:
        start, end, to = phase["start_s"], phase["end_s"], phase["copies_to"]
        middle, took = (start + end) / 2, end - start
        last = seconds.index(end)
        works = phase["name"] in ("sleep", "wake weights", "wake KV cache")
        if works:
            for axes in (device, host, link):
                axes.axvspan(start, end, color="black", alpha=0.06, linewidth=0)
        name = phase["name"].replace(" ", "\n", 1)
        text = f"{name}\n{took * 1e3:.0f} ms" if works else name
        device.annotate(
            text,
            (middle, 1.03),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            weight="bold" if works else "normal",
            color="black" if works else _QUIET,
        )
        if not works:
            device.annotate(
                f"{device_gib[last]:.2f} GiB",
                (middle, device_gib[last]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=_DEVICE,
            )
        if to is not None:
            speed = samples["copied"][last] / took / 1e9
            peak = result["link_peak_gb_s"]["d2h" if to == "host" else "h2d"]
            colour = _HOST if to == "host" else _DEVICE
            link.fill_between((start, end), speed, color=colour, alpha=0.6, linewidth=0)
            link.plot((start, end), (peak, peak), color="black", linewidth=1, linestyle=":")
            share = f"{100 * speed / peak:.0f} % of one copy's peak"
            text = f" to the {to}\n {speed:.1f} GB/s,\n {share}"
            link.annotate(text, (end, speed / 2), va="center", color=colour)
    asleep = next(phase for phase in phases if phase["name"] == "asleep")
    middle = (asleep["start_s"] + asleep["end_s"]) / 2
    sleeping = result["weights_bytes"] / GIB
    host.annotate("weights that sleep", (middle, sleeping / 2), ha="center", color=_HOST)
    host.annotate(
        f"page-locked, taken ahead: {host_gib[0]:.2f} GiB",
        (seconds[-1], host_gib[0]),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=_HOST,
    )
    for axes, label in ((device, "Device memory\nGiB"), (host, "Host memory\nGiB")):
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.15 * max(device_gib if axes is device else host_gib))
    link.set_ylabel("Link\nGB/s")
    link.set_ylim(0, 1.25 * max(result["link_peak_gb_s"].values()))
    link.set_xlabel("Seconds")
    link.set_xlim(seconds[0], seconds[-1])
    weights, cache = (result[name] / GIB for name in ("weights_bytes", "kv_bytes"))
    where = _WHERE[result["device"]].format(device=result["machine"]["device"])
    figure.suptitle(
        f"Sleep at level 1 and wake of {weights:.1f} GiB of weights and {cache:.1f} GiB of KV cache"
        f"\n{where}",
        fontsize=9.5,
    )
    figure.savefig(path, dpi=200)
    print(f"wrote {path}")


def _asleep_gib(result: dict[str, Any]) -> list[float]:
    """For each sample: the backup of weights that are not on the device."""
    samples, now = result["samples"], 0.0
    gib = [0.0] * len(samples["s"])
    for phase in result["phases"]:
        for number, at in enumerate(samples["s"]):
            if phase["start_s"] <= at <= phase["end_s"]:
                copied = samples["copied"][number] / GIB
                gib[number] = now + copied * {"host": 1, "device": -1}.get(phase["copies_to"], 0)
        now = gib[samples["s"].index(phase["end_s"])]
    return gib
