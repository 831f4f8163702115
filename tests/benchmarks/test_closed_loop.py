# SPDX-License-Identifier: Apache-2.0
"""What the closed loop's check finds, without a loop. About 1 second."""

import pytest
from helpers import ROOT


@pytest.fixture
def closed_loop(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import closed_loop

    return closed_loop


def test_only_what_a_killed_server_had_may_be_lost(closed_loop, tmp_path):
    loop = closed_loop.Loop(closed_loop.Proxy((), [tmp_path], tmp_path), ["a"])
    loop.awake, loop.used, loop.total = [2], [0.8], 100
    kill = closed_loop.Kill("a", pid=7, at=10)
    loop.killed = [kill]
    for state, pid, now in [("awake", 7, 11), ("stopping", 7, 12), ("awake", 8, 20)]:
        kill.look({"state": state, "pid": pid}, now)
    assert (kill.noticed, kill.again) == (12, 20)
    for lost in [("a", 502, 9, 11), ("a", 502, 11, 13)]:
        loop.lost = [closed_loop.Lost(*lost)]
        assert loop.check() == []
    others = [("b", 502, 9, 11), ("a", 503, 9, 11), ("a", 502, 8, 9), ("a", 502, 13, 14)]
    for lost in [*others, ("a", 502, 11, 21)]:
        loop.lost = [closed_loop.Lost(*lost)]
        assert len(loop.check()) == 1
    loop.lost, loop.awake, loop.used = [], [3], [0.81]
    assert len(loop.check()) == 2
