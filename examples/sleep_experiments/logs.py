# SPDX-License-Identifier: Apache-2.0
"""The logs of the experiments: the measurements, and which arms belong together."""

import json
import statistics
from pathlib import Path
from typing import Any

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))

# Experiment: title and two arms. The speed-up is the second arm's seconds by the first arm's.
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
        ValueError: the log is not from an experiment, or from a failed one.
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
    """Figures of one arm: seconds by model (median of the rounds), the total, and bytes."""

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

    def freed(model: str) -> list[float]:
        awake, asleep = of(model, "device_used", "prompt"), of(model, "device_used", "sleep")
        return [before - after for before, after in zip(awake, asleep, strict=False)]

    return {
        "switch": median("seconds", "wake", "load"),
        "first_inference": median("seconds", "prompt"),
        "first_inference_of_all": {m: of(m, "seconds", "prompt")[0] for m in "AB"},
        "first_token": median("first_token_s", "prompt"),
        "to_first_token": median("switch_to_first_token_s", "prompt"),
        "tokens_per_s": median("tokens_per_s", "prompt"),
        "sleep": median("seconds", "sleep", "terminate"),
        "first_sleep": {e["model"]: e["seconds"] for e in events if e["event"] == "first sleep"},
        "freed": {m: statistics.median(freed(m)) for m in "AB" if freed(m)},
        "backup": median("weights_backup", "sleep"),
        "total": events[-1]["seconds"],
    }


def find(experiment: str, name: str, arms: Arms) -> Events | None:
    """The arm's log, or that of the same run in another experiment."""
    if (experiment, name) in arms:
        return arms[experiment, name]
    wanted = SAME_RUN.get(name, name)
    same = (events for (_, arm), events in arms.items() if SAME_RUN.get(arm, arm) == wanted)
    return next(same, None)


def compared(experiment: str, arms: Arms) -> list[Events] | None:
    """Both arms of an experiment, or None if a log is missing.

    Raises:
        ValueError: the arms differ in more than what is compared.
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
