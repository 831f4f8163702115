# SPDX-License-Identifier: Apache-2.0
"""As many servers are awake as fit by bytes. The servers are stand-ins that report theirs."""

import signal

from helpers.fleet import Fleet, stand_in
from helpers.patience import wait_for


def awake(fleet: Fleet) -> set[str]:
    return {name for name, state in fleet.states().items() if state == "awake"}


def test_as_many_are_awake_as_fit(tmp_path):
    """The device has 100 bytes."""
    models = {
        name: stand_in(tmp_path, name, "--reports-memory", "--bytes", str(size), devices=0)
        for name, size in (("a", 40), ("b", 40), ("c", 60))
    }
    with Fleet(tmp_path, models) as fleet:
        pids = {name: fleet.pid_of(name) for name in models}
        assert awake(fleet) == {"c"}
        fleet.pid_of("b")
        fleet.write(models, max_awake="fit")
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "0 changed" in fleet.log.read_text())
        before = len(fleet.events())
        for name, there in (("a", "ab"), ("b", "ab"), ("c", "bc"), ("b", "bc"), ("a", "ab")):
            assert fleet.pid_of(name) == pids[name]
            assert awake(fleet) == set(there)
        assert fleet.events()[before:] == [
            *("a wakes", "a sleeps", "c wakes", "c sleeps", "a wakes"),
        ]
        # Found again as it is.
        fleet.process.kill()
        fleet.process.wait()
        fleet.start()
        wait_for(lambda: awake(fleet) == {"a", "b"})
        assert fleet.events()[before + 5 :] == ["c sleeps"]  # again, as nobody knows how deep


def test_groups_go_before_bytes(tmp_path):
    """Two members swap although all fit, and the third, in a persistent group, stays."""
    models = {
        name: stand_in(tmp_path, name, "--reports-memory", "--bytes", "30", devices=0)
        for name in ("a", "b", "kept")
    }
    with Fleet(tmp_path, models, "--max-awake", "fit") as fleet:
        for name in models:
            fleet.pid_of(name)
        groups = {
            "pair": {"members": ["a", "b"], "swap": True},
            "kept": {"members": ["kept"], "persistent": True},
        }
        fleet.write(models, groups=groups)
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "3 changed" in fleet.log.read_text())
        for name in ("a", "b", "a"):
            fleet.pid_of(name)
            assert awake(fleet) == {name, "kept"}
        assert fleet.status()["kept"]["group"] == "kept"
        models["d"] = stand_in(tmp_path, "d", devices=0)
        fleet.write(models, groups=groups)
        fleet.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "1 added" in fleet.log.read_text())
        answer = fleet.ask("d")
        assert answer.status_code == 503
        said = "d does not fit beside kept, awake in a persistent group; put it to sleep, or change"
        assert said in answer.json()["error"]["message"]
        assert awake(fleet) == {"a", "kept"}
