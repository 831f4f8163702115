# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures from the logs of the experiments.

    python -m examples.sleep_experiments report LOG... [--out FOLDER]   # in the repository's root
    python report.py LOG... [--out FOLDER]                              # in this folder

LOG is a log of one arm, or a folder: all *.log below it. Markdown goes to stdout, and the pictures
timeline.png and speedup.png (which need matplotlib) to FOLDER, by default here.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))

# Experiment: title, and its two arms. The speed-up is the second's seconds by the first's.
EXPERIMENTS = {
    "default": ("Sleep mode against no sleep mode", ("sleep", "nosleep")),
    "fp8": ("Sleep mode without and with 8-bit weights", ("nofp8", "fp8")),
    "sleep1_nowarm": ("Sleep mode with and without warm-up", ("sleep1", "nowarmup")),
    "sleep1_2": ("Sleep level 1 against level 2 with weights loaded again", ("sleep1", "sleep2")),
    "sleep2_nosleep": ("Sleep level 2 against no sleep mode", ("sleep2", "nosleep")),
}

# Arms of several experiments that are the same run: one log serves all.
SAME_RUN = {"sleep1": "sleep", "nofp8": "sleep"}

Events = list[dict[str, Any]]
Arms = dict[tuple[str, str], Events]


def read_log(path: Path) -> Events:
    """The events of one arm.

    Raises:
        ValueError: the log is of no experiment, or of one that did not end well.
    """
    events: Events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith('{"event":'):
            events.append(json.loads(line))
    if not events or events[0]["event"] != "experiment":
        raise ValueError(f"{path} is not the log of an experiment")
    if events[-1]["event"] != "done":
        reason = events[-1].get("reason", "it ended early")
        raise ValueError(f"{path}: the experiment failed: {reason}")
    return events


def measures(events: Events) -> dict[str, Any]:
    """Figures of one arm: seconds by model (medians over the rounds), the total, and bytes."""

    def of(model: str, field: str, *names: str) -> list[float]:
        return [
            event[field]
            for event in events
            if event["event"] in names
            and event.get("model") == model
            and event.get("round")
            and event.get(field) is not None
        ]

    def median(field: str, *names: str) -> dict[str, float]:
        return {
            model: statistics.median(values)
            for model in "AB"
            if (values := of(model, field, *names))
        }

    return {
        "switch": median("seconds", "wake", "load"),
        "first_inference": median("seconds", "prompt"),
        "first_inference_of_all": {m: of(m, "seconds", "prompt")[0] for m in "AB"},
        "first_token": median("first_token_s", "prompt"),
        "to_first_token": median("switch_to_first_token_s", "prompt"),
        "tokens_per_s": median("tokens_per_s", "prompt"),
        "sleep": median("seconds", "sleep", "terminate"),
        "first_sleep": {e["model"]: e["seconds"] for e in events if e["event"] == "first sleep"},
        "backup": median("weights_backup", "sleep"),
        "total": events[-1]["seconds"],
    }


ROWS = (
    ("switch", "Switch: wake, or start until it serves", "s"),
    ("to_first_token", "Switch and first token", "s"),
    ("first_token", "First token after the switch", "s"),
    ("first_inference", "First inference after the switch", "s"),
    ("first_inference_of_all", "Very first inference", "s"),
    ("tokens_per_s", "Tokens per second", ""),
    ("first_sleep", "First sleep", "s"),
    ("sleep", "Later sleeps, or end of the server", "s"),
    ("backup", "Backup in host memory", "MiB"),
)


def find(experiment: str, name: str, arms: Arms) -> Events | None:
    """The arm's own log, or that of the same run for another experiment."""
    if (experiment, name) in arms:
        return arms[experiment, name]
    wanted = SAME_RUN.get(name, name)
    same = (events for (_, arm), events in arms.items() if SAME_RUN.get(arm, arm) == wanted)
    return next(same, None)


def compared(experiment: str, arms: Arms) -> list[Events] | None:
    """Both arms of an experiment, None if there is no log of one.

    Raises:
        ValueError: the arms differ in more than what the experiment compares.
    """
    found = [find(experiment, name, arms) for name in EXPERIMENTS[experiment][1]]
    events = [each for each in found if each is not None]
    if len(events) < 2:
        return None
    for setting in ("a", "b", "tp_a", "tp_b", "rounds", "tokens"):
        values = [each[0][setting] for each in events]
        if values[0] != values[1]:
            both = f"{values[0]} and {values[1]}"
            raise ValueError(f"{experiment}: the arms differ in {setting}: {both}")
    return events


def table(experiment: str, arms: Arms) -> str:
    """The table of one experiment, in Markdown."""
    title, names = EXPERIMENTS[experiment]
    number = list(EXPERIMENTS).index(experiment) + 1
    lines = [f"## Table {number}: {title}", ""]
    events = compared(experiment, arms)
    if events is None:
        missing = [name for name in names if find(experiment, name, arms) is None]
        return "\n".join([*lines, f"No log of {' and '.join(missing)}.", ""])
    first, second = (measures(found) for found in events)
    settings = events[0][0]
    models = {"A": settings["a"], "B": settings["b"]}
    lines += [f"A = {Path(models['A']).name}, B = {Path(models['B']).name}.", ""]
    for name, log in zip(names, events, strict=True):
        if log[0]["experiment"] != experiment:
            other = f"`{log[0]['experiment']}`, arm `{log[0]['arm']}`"
            lines += [f"`{name}` is the run of {other}: the same settings.", ""]
    published = PUBLISHED["experiments"][experiment]
    ratio = f"{names[1]} / {names[0]}"
    lines.append(f"| | {names[0]} | {names[1]} | {ratio} | on other hardware | {ratio} there |")
    lines.append("|---|---|---|---|---|---|")
    for key, label, unit in ROWS:
        for model in "AB":
            ours = [found[key].get(model) for found in (first, second)]
            if ours[0] is None and ours[1] is None:
                continue
            theirs = [published[name].get(key, {}).get(model) for name in names]
            lines.append(_row(f"{label}, {model}", ours, theirs, unit))
    theirs = [published[name].get("total") for name in names]
    lines.append(_row("Total", [first["total"], second["total"]], theirs, "s"))
    return "\n".join([*lines, ""])


def _row(label: str, ours: list, theirs: list, unit: str) -> str:
    def show(value: float | None) -> str:
        if value is None:
            return "-"
        shown = value / 2**20 if unit == "MiB" else value
        digits = 3 if abs(shown) < 10 else 1
        return f"{shown:.{digits}f} {unit}".strip()

    def ratio(pair: list) -> str:
        return f"{pair[1] / pair[0]:.2f}" if pair[0] and pair[1] is not None else "-"

    reference = f"{show(theirs[0])} / {show(theirs[1])}" if None not in theirs else "-"
    cells = [label, show(ours[0]), show(ours[1]), ratio(ours), reference, ratio(theirs)]
    return f"| {' | '.join(cells)} |"


def markdown(arms: Arms) -> str:
    """The whole report."""
    head = [
        "# Sleep experiments",
        "",
        "Medians over the rounds. The figures on other hardware, which vLLM's blog post published, "
        f"are of other models as well: {PUBLISHED['hardware']} ({PUBLISHED['source']}). "
        "They are there for the ratios; seconds cannot be compared.",
        "",
    ]
    return "\n".join(head + [table(experiment, arms) for experiment in EXPERIMENTS])


def draw(arms: Arms, out: Path) -> list[Path]:
    """timeline.png and speedup.png in ``out``; none without matplotlib."""
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
            theirs.append(switch[1] / switch[0] if None not in switch else 0)
    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    places = range(len(labels))
    bars = axes.bar([x - 0.2 for x in places], ours, 0.4, label="these logs", color="#2a9d8f")
    axes.bar_label(bars, fmt="%.2g", fontsize=8)
    label = "published on other hardware (CUDA, A100)"
    bars = axes.bar([x + 0.2 for x in places], theirs, 0.4, label=label, color="#c9c9c9")
    axes.bar_label(bars, [f"{value:.2g}" if value else "" for value in theirs], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("time of a switch, ratio of the arms")
    axes.set_xticks(places, labels, fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures")
    args = parser.parse_args(argv)
    arms: Arms = {}
    try:
        for given in args.logs:
            for path in sorted(given.rglob("*.log")) if given.is_dir() else [given]:
                events = read_log(path)
                arms[events[0]["experiment"], events[0]["arm"]] = events
        print(markdown(arms))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for picture in draw(arms, args.out):
        print(f"{picture} drawn", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
