# SPDX-License-Identifier: Apache-2.0
"""A server sleeps and wakes at random under load: a few rounds, and many with ``--long``."""

import pytest
from helpers.soak import growth, soak


@pytest.mark.slow
@pytest.mark.parametrize(
    "rounds", [3, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
def test_completions_are_right_while_the_server_sleeps_and_wakes_at_random(
    tiny_model, tmp_path, rounds
):
    result = soak(tiny_model, rounds=rounds, seed=20261121, log=tmp_path / "log")
    assert result.failures == []
    assert growth(result) == []
    assert result.answered > 10 * rounds
    assert sum(result.sleeps.values()) == 9 * (rounds + 1)
    assert len(result.sleeps) == 9, "every level in every mode"
