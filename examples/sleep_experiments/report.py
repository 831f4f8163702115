# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures from the logs of the experiments.

    python -m examples.sleep_experiments report LOG... [--out FOLDER]   # in the repository's root
    python report.py LOG... [--out FOLDER]                              # in this folder

LOG is a log of one arm, or a folder: all *.log below it. Markdown goes to stdout, and the pictures
timeline.png and speedup.png (which need matplotlib) to FOLDER, by default here.
"""

import argparse
import sys
from pathlib import Path

from logs import EXPERIMENTS, PUBLISHED, Arms, compared, find, measures, read_log
from pictures import draw

ROWS = (
    ("switch", "Switch: wake, or start until it serves", "s"),
    ("to_first_token", "Switch and first token", "s"),
    ("first_token", "First token after the switch", "s"),
    ("first_inference", "First inference after the switch", "s"),
    ("first_inference_of_all", "Very first inference", "s"),
    ("tokens_per_s", "Tokens per second", ""),
    ("first_sleep", "First sleep", "s"),
    ("sleep", "Later sleeps, or end of the server", "s"),
    ("freed", "Device memory that a sleep frees", "MiB"),
    ("backup", "Backup in host memory", "MiB"),
)


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
