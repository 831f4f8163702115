# SPDX-License-Identifier: Apache-2.0
"""As many servers are awake as fit by bytes. The servers are stand-ins that report theirs, on one
device."""

import signal
from pathlib import Path
from typing import Any

from helpers.fleet import Fleet, stand_in
from helpers.patience import wait_for
from helpers.stand_in import TOTAL

SHARES = (("a", "0.4"), ("b", "0.4"), ("c", "0.6"))


def awake(fleet: Fleet) -> set[str]:
    return {name for name, state in fleet.states().items() if state == "awake"}


def entry(folder: Path, name: str, share: str) -> dict[str, Any]:
    options = ("--reports-memory", "--gpu-memory-utilization", share)
    return stand_in(folder, name, *options, devices=0)


def test_as_many_are_awake_as_fit(tmp_path):
    models = {name: entry(tmp_path, name, share) for name, share in SHARES}
    with Fleet(tmp_path, models, "--turn-s", "0") as fleet:
        pids = {name: fleet.pid_of(name) for name in models}
        assert awake(fleet) == {"c"}
        fleet.pid_of("b")
        fleet.write(models, max_awake="fit")
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "0 changed" in fleet.log.read_text())
        assert "max_awake is fit" in fleet.log.read_text()
        before = len(fleet.events())
        for name, there in (("a", "ab"), ("b", "ab"), ("c", "bc"), ("b", "bc"), ("a", "ab")):
            assert fleet.pid_of(name) == pids[name]
            assert awake(fleet) == set(there)
        assert fleet.events()[before:] == [
            *("a wakes", "a sleeps", "c wakes", "c sleeps", "a wakes"),
        ]
        assert fleet.status()["c"]["device_bytes"] == [int(0.6 * TOTAL)]
        # Found again as it is.
        fleet.process.kill()
        fleet.process.wait()
        fleet.start()
        wait_for(lambda: fleet.states() == {"a": "awake", "b": "awake", "c": "asleep"})
        assert fleet.events()[before + 5 :] == ["c sleeps"]  # again, as nobody knows how deep


def test_groups_go_before_bytes(tmp_path):
    """All fit. Two members swap, and the third model, in a persistent group, stays."""
    models = {name: entry(tmp_path, name, "0.3") for name in ("a", "b", "kept")}
    groups = {
        "pair": {"members": ["a", "b"], "swap": True},
        "kept": {"members": ["kept"], "persistent": True},
    }
    with Fleet(tmp_path, models, "--max-awake", "fit") as fleet:
        for name in models:
            fleet.pid_of(name)
        assert fleet.events() == ["a starts 0", "b starts 0", "kept starts 0"]
        models["alone"] = stand_in(tmp_path, "alone", devices=0)
        fleet.write(models, groups=groups)
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "3 changed" in fleet.log.read_text())
        assert fleet.status()["kept"]["group"] == "kept"
        assert awake(fleet) == {"a", "b", "kept"}  # until one of them has to wake
        fleet.admin.post("/sleep", params={"model": "a"})
        for name in ("a", "b", "a"):
            fleet.pid_of(name)
            assert awake(fleet) == {name, "kept"}
        answer = fleet.ask("alone")
        assert answer.status_code == 503
        said = "alone does not fit beside kept, awake in a persistent group; put it to sleep, or"
        assert said in answer.json()["error"]["message"]
        assert awake(fleet) == {"a", "kept"}
