# SPDX-License-Identifier: Apache-2.0
"""Results as a table, as JSON and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
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
    """Speeds as a share of the link's peak of the same process, and seconds."""
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
