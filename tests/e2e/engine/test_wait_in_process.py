# SPDX-License-Identifier: Apache-2.0
"""``mode="wait"`` of an in-process engine, which only the caller steps."""

import pytest
from helpers.engine import engine, few, mapped, tokens
from helpers.reference import FEW, FEW_TOKENS

LONG = 40


def params(n: int):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)


def finish(llm) -> dict[str, list[int]]:
    """Step the engine as its users do, and return the tokens of each finished request."""
    done = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                assert output.outputs[0].finish_reason == "length"
                done[output.request_id] = list(output.outputs[0].token_ids)
    return done


@pytest.mark.parametrize("level", [0, 1, 2])
def test_requests_under_way_end_before_the_sleep_and_are_delivered_after_it(llm, expected, level):
    whole = tokens(llm, FEW, LONG)
    for number, prompt in enumerate(FEW):
        llm.llm_engine.add_request(str(number), prompt, params(LONG))
    seen = [output for _ in range(5) for output in llm.llm_engine.step()]
    assert seen and not any(output.finished for output in seen)
    llm.llm_engine.add_request("queued", FEW[0], params(LONG))
    llm.sleep(level=level, mode="wait")
    assert (mapped() == 0) == (level > 0)
    assert llm.llm_engine.get_num_unfinished_requests() == len(FEW) + 1

    asleep = [output for _ in range(2 * LONG) for output in llm.llm_engine.step()]
    done = {o.request_id: list(o.outputs[0].token_ids) for o in asleep if o.finished}
    assert done == {str(number): answer for number, answer in enumerate(whole)}
    assert llm.llm_engine.step() == []

    llm.wake_up()
    if level == 2:
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
    assert finish(llm) == {"queued": whole[0]}
    assert few(llm) == expected


def test_outputs_that_nobody_asked_for_are_there_after_the_wake(llm, expected):
    whole = tokens(llm, FEW, LONG)
    llm.enqueue(FEW, params(LONG), use_tqdm=False)
    llm.llm_engine.step()
    llm.sleep(level=1, mode="wait")
    llm.wake_up()
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == whole


def test_nothing_to_wait_for(llm, expected):
    llm.sleep(level=1, mode="wait")
    assert mapped() == 0
    llm.sleep(level=2, mode="wait")  # asleep already: nothing is stepped
    llm.wake_up()
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    assert few(llm) == expected


def test_requests_that_have_not_begun_are_refused_by_option(tiny_model, expected):
    from vllm_sleep_ascend.errors import SleepModeError

    options = {"sleep_mode": {"while_asleep": "refuse"}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=options) as llm:
        llm.llm_engine.add_request("1000", FEW[0], params(FEW_TOKENS))
        llm.llm_engine.step()
        llm.enqueue(FEW[1:], params(LONG), use_tqdm=False)
        llm.sleep(level=1, mode="keep")
        with pytest.raises(SleepModeError, match="the engine sleeps; wake it with wake_up"):
            llm.enqueue(FEW, params(LONG), use_tqdm=False)
        llm.wake_up()
        *refused, kept = llm.wait_for_completion(use_tqdm=False)
        assert list(kept.outputs[0].token_ids) == expected[0]
        assert [output.outputs[0].finish_reason for output in refused] == ["abort"] * len(FEW[1:])
        assert all("the engine sleeps" in output.outputs[0].stop_reason for output in refused)
        assert few(llm) == expected
