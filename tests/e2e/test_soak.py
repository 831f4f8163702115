# SPDX-License-Identifier: Apache-2.0
"""Two minutes of what ``make soak`` does for thirty."""

from soak import growth, soak


def test_completions_are_right_while_the_server_sleeps_and_wakes_at_random(tiny_model, tmp_path):
    result = soak(tiny_model, minutes=2, seed=20261121, log=tmp_path / "log")
    assert result.failures == []
    assert growth(result) == []
    assert result.answered > 100
    assert sum(result.sleeps.values()) > 20
    assert {name.split(",")[0] for name in result.sleeps} == {"level 0", "level 1", "level 2"}
    assert {name.split(", ")[1] for name in result.sleeps} == {"abort", "wait", "keep"}
