# SPDX-License-Identifier: Apache-2.0
import re

import pytest
from helpers import ROOT

from vllm_sleep_ascend import policy


@pytest.mark.parametrize("level", [0, 1, 2])
def test_levels_that_exist(level):
    assert policy.check_level(level) == level


@pytest.mark.parametrize("level", [3, -1, "1", 1.0, None, True])
def test_other_levels_are_named_and_refused(level):
    with pytest.raises(ValueError, match=f"{level!r} does not exist; use 0 .*1 .*2"):
        policy.check_level(level)


def test_tags_come_once_and_in_order():
    assert policy.check_tags(["kv_cache", "weights", "kv_cache"]) == ["kv_cache", "weights"]
    assert policy.check_tags(None) is None


@pytest.mark.parametrize("tag", ["wieghts", "WEIGHTS", "", "runtime"])
def test_other_tags_are_named_and_refused(tag):
    with pytest.raises(ValueError, match=f"{tag!r} does not exist; use some of weights, kv_cache"):
        policy.check_tags(["weights", tag])


def test_one_string_is_no_list_of_tags():
    with pytest.raises(ValueError, match=r"must be a list, such as \['weights'\]"):
        policy.check_tags("weights")


@pytest.mark.parametrize("tags", [5, {"weights": 1}, b"weights", [["weights"]], [None]])
def test_tags_of_another_type_are_named_and_refused(tags):
    with pytest.raises(ValueError, match="weights, kv_cache, scheduling"):
        policy.check_tags(tags)


def test_other_pause_modes_are_refused():
    assert policy.check_mode("keep") == "keep"
    with pytest.raises(ValueError, match="'kill' does not exist; use one of abort, wait, keep"):
        policy.check_mode("kill")


def test_level_2_forgets_the_weights_and_level_1_does_not():
    assert policy.POLICY[1]["weights"] == "offload"
    assert policy.POLICY[2]["weights"] == "discard"
    for level in (1, 2):
        assert policy.POLICY[level]["kv_cache"] == "discard"
        assert policy.POLICY[level]["runtime"] == "offload"


@pytest.mark.parametrize("guide", ["guide.md", "guide.zh.md"])
def test_the_guides_list_the_calls_that_are_safe_while_asleep(guide):
    text = (ROOT / "docs" / guide).read_text()
    section = next(part for part in text.split("\n## ") if "worker_extension_cls" in part)
    listed = re.findall(r"`(\w+)`(?:,|;|、|\uff1b)", section.partition("\n- ")[2])
    assert tuple(listed) == policy.SAFE_CALLS
