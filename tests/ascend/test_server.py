# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` beside vllm-ascend: the commands of its guide, and their answers."""

import test_published_guides as guides
from helpers.faults import set_faults

# The same commands, the same promises.
run = guides.run
test_the_english_guide = guides.test_the_english_guide
test_the_chinese_guide = guides.test_the_chinese_guide
test_vllms_page = guides.test_vllms_page_tags_wake_one_after_the_other
test_the_russian_page = guides.test_the_russian_page_lists_the_calls_of_level_2

DRIVER_ERROR = 507899


def test_the_engine_is_vllm_ascends(server):
    log = server.log.read_text()
    assert "Platform plugin ascend is activated" in log
    assert "Sleep mode is provided by vllm_sleep_ascend" in log


def test_refusals_have_a_reason_and_touch_nothing(server, left_awake):
    before = server.complete()
    for path in ("/sleep?level=3", "/sleep?level=1&mode=hard", "/wake_up?tags=wieghts"):
        answer = server.http.post(path)
        assert answer.status_code == 400, answer.text
        assert "does not exist; use" in answer.json()["error"]["message"]
    assert server.http.get("/sleep_status").json()["state"] == "awake"
    assert server.complete() == before


def test_a_failed_sleep_and_a_failed_wake_are_told_and_can_be_repeated(server, faults, left_awake):
    before = server.complete()
    set_faults(faults, f"aclrtMemcpyAsync:1:{DRIVER_ERROR}")
    answer = server.http.post("/sleep?level=1")
    assert answer.status_code == 503
    assert "aclrtMemcpyAsync failed" in answer.json()["error"]["message"]
    set_faults(faults, "")
    assert server.http.get("/sleep_status").json()["state"] == "awake"
    assert server.complete() == before
    server.post("/sleep?level=1")
    set_faults(faults, f"aclrtMapMem:1:{DRIVER_ERROR}")
    assert server.http.post("/wake_up").status_code == 503
    set_faults(faults, "")
    assert server.http.get("/sleep_status").json()["state"] == "asleep"
    server.post("/wake_up")
    assert server.complete() == before
