# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report: a timeline of the arms, and the speed-ups of their switches."""

import sys
from pathlib import Path

from logs import EXPERIMENTS, PUBLISHED, Arms, compared, measures


def draw(arms: Arms, out: Path) -> list[Path]:
    """Draw timeline.png and speedup.png in ``out``; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("No pictures: matplotlib is missing (pip install matplotlib).", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    return [_draw_timeline(arms, out / "timeline.png"), _draw_speedup(arms, out / "speedup.png")]


COLOURS = {
    "load": "#b0492f",
    "warm up": "#e0a458",
    "first sleep": "#5b5ea6",
    "sleep": "#9b9ecf",
    "terminate": "#777777",
    "wake": "#2a9d8f",
    "prompt": "#9ccfc4",
}


def _draw_timeline(arms: Arms, path: Path) -> Path:
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    order = [(e, a) for e, (_, names) in EXPERIMENTS.items() for a in names if (e, a) in arms]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.45 * len(order)))
    for row, key in enumerate(order):
        for event in arms[key]:
            if event["event"] not in COLOURS:
                continue
            axes.barh(
                row,
                event["seconds"],
                left=event["end"] - event["seconds"],
                color=COLOURS[event["event"]],
                hatch="" if event["model"] == "A" else "///",
                edgecolor="white",
                linewidth=0.3,
            )
    axes.set_yticks(range(len(order)), [f"{experiment}: {arm}" for experiment, arm in order])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds on the machine of these logs (model B is hatched)")
    legend = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes.legend(handles=legend, ncols=len(legend), loc="lower center", bbox_to_anchor=(0.4, 1))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _draw_speedup(arms: Arms, path: Path) -> Path:
    from matplotlib import pyplot, ticker

    labels, ours, theirs = [], [], []
    for number, (experiment, (_, names)) in enumerate(EXPERIMENTS.items(), 1):
        events = compared(experiment, arms)
        if events is None:
            continue
        found = [measures(each) for each in events]
        published = [PUBLISHED["experiments"][experiment][name] for name in names]
        for model in "AB":
            labels.append(f"{number}. {names[1]} /\n{names[0]}, {model}")
            ours.append(found[1]["switch"][model] / found[0]["switch"][model])
            switch = [arm.get("switch", {}).get(model) for arm in published]
            theirs.append(switch[1] / switch[0] if None not in switch else None)
    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    published_label = "published on other hardware (CUDA, A100)"
    series = ((-0.2, ours, "these logs", "#2a9d8f"), (0.2, theirs, published_label, "#c9c9c9"))
    for shift, ratios, label, colour in series:
        # Bars start at 1, which means no difference.
        heights = [(ratio or 1) - 1 for ratio in ratios]
        places = [place + shift for place in range(len(labels))]
        bars = axes.bar(places, heights, 0.4, bottom=1, label=label, color=colour)
        axes.bar_label(bars, [_ratio(ratio) for ratio in ratios], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.margins(y=0.08)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel("time of a switch, ratio of the arms")
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
