# SPDX-License-Identifier: Apache-2.0
"""The options of ``additional_config={"sleep_mode": ...}`` in a real engine."""

import pytest
from engines import engine
from reference import PROMPTS, hf_greedy, vllm_greedy

from vllm_sleep_ascend import _camem

TOKENS = 6


def last_sleep(llm) -> dict[str, dict[str, int]]:
    """Bytes by tag of the last operation of the one worker."""
    (status,) = llm.collective_rpc("sleep_status")
    return status["last_operation"]["tags"]


@pytest.mark.parametrize(
    "options",
    [
        {"host_backup": "prepared"},
        {"skip_unchanged": True},
        {"verify_wake": True},
        {"keep_host_backup": False, "chunk_mib": 2},
    ],
    ids=str,
)
def test_tokens_and_bytes(tiny_model, options):
    expected = hf_greedy(tiny_model, PROMPTS[:2], TOKENS)
    config = {"sleep_mode": options}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=config) as llm:
        if "host_backup" in options:
            assert _camem.wait_prepared(30)
        moved = []
        for _ in range(2):
            assert vllm_greedy(llm, PROMPTS[:2], TOKENS) == expected
            llm.sleep(level=1)
            moved.append(last_sleep(llm)["weights"])
            llm.wake_up()
        assert moved[0]["offloaded"] > 0
        # An earlier engine's rotary tables live on in the process, perhaps backed up already.
        total = moved[0]["offloaded"] + moved[0]["unchanged"]
        skips = "skip_unchanged" in options or "verify_wake" in options
        assert moved[1]["unchanged"] == (total if skips else 0)
        assert moved[1]["offloaded"] == (0 if skips else total)
        assert (_camem.pinned_host_bytes() == 0) == (options.get("keep_host_backup") is False)
        assert vllm_greedy(llm, PROMPTS[:2], TOKENS) == expected
