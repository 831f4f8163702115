# SPDX-License-Identifier: Apache-2.0
"""Wrong uses of an engine and their errors; after each the engine serves the same tokens.

More of them are in the tests of each module: levels, modes and tags in ``test_policy.py``, options
in ``test_config.py``, HTTP in ``test_server.py``, set-up in ``test_setup.py``, missing memory in
``test_pool.py`` and ``test_faults.py``.
"""

import pytest
from helpers.engine import engine, few, start

from vllm_sleep_ascend.errors import SleepModeError

AWAKE = [
    ("a level above 2", lambda llm: llm.sleep(level=3), ValueError, "level 3 does not exist"),
    ("a negative level", lambda llm: llm.sleep(level=-1), ValueError, "level -1 does not exist"),
    ("a level as text", lambda llm: llm.sleep(level="1"), ValueError, "level '1' does not exist"),
    ("a level as float", lambda llm: llm.sleep(level=1.0), ValueError, "level 1.0 does not exist"),
    ("a level as bool", lambda llm: llm.sleep(level=True), ValueError, "level True does not exist"),
    ("no level", lambda llm: llm.sleep(level=None), ValueError, "level None does not exist"),
    ("levels", lambda llm: llm.sleep(level=[1]), ValueError, r"level \[1\] does not exist"),
    ("another mode", lambda llm: llm.sleep(mode="kill"), ValueError, "mode 'kill' does not exist"),
    ("an empty mode", lambda llm: llm.sleep(mode=""), ValueError, "mode '' does not exist"),
    ("no mode", lambda llm: llm.sleep(mode=None), ValueError, "mode None does not exist"),
    ("a wrong tag", lambda llm: llm.wake_up(tags=["wieghts"]), ValueError, "tag 'wieghts' does"),
    ("a tag as text", lambda llm: llm.wake_up(tags="weights"), ValueError, "must be a list"),
    ("an internal tag", lambda llm: llm.wake_up(tags=["runtime"]), ValueError, "tag 'runtime' d"),
    ("an empty tag", lambda llm: llm.wake_up(tags=[""]), ValueError, "tag '' does not exist"),
    ("no tag", lambda llm: llm.wake_up(tags=[None]), ValueError, "tag None does not exist"),
    ("a number", lambda llm: llm.wake_up(tags=[1]), ValueError, "tag 1 does not exist"),
    ("one bad tag", lambda llm: llm.wake_up(["weights", "kv"]), ValueError, "tag 'kv' does not"),
    (
        "releasing the cache of an engine that runs",
        lambda llm: llm.release_kv_cache_memory(),
        RuntimeError,
        "requires a completed pause first",
    ),
]

ASLEEP = [
    ("generate", lambda llm: llm.generate("Hi"), SleepModeError, r"wake_up\(\) before generate"),
    ("reload", lambda llm: llm.collective_rpc("reload_weights"), SleepModeError, "asleep .weights"),
    ("reset", lambda llm: llm.collective_rpc("reset_weights"), SleepModeError, "asleep .weights"),
    (
        "checksums",
        lambda llm: llm.collective_rpc("compute_weight_checksums"),
        SleepModeError,
        r"compute_weight_checksums needs memory that is asleep \(weights\)",
    ),
    (
        "an update",
        lambda llm: llm.collective_rpc("start_weight_update"),
        SleepModeError,
        r"start_weight_update needs .* \(weights\); call wake_up\(tags=\['weights'\]\) first",
    ),
    (
        "an update's weights",
        lambda llm: llm.collective_rpc("update_weights", args=({},)),
        SleepModeError,
        "update_weights needs memory",
    ),
    ("a level above 2", lambda llm: llm.sleep(level=3), ValueError, "level 3 does not exist"),
    ("a wrong tag", lambda llm: llm.wake_up(tags=["cache"]), ValueError, "tag 'cache' does not"),
    (
        "releasing the cache",
        lambda llm: llm.release_kv_cache_memory(),
        RuntimeError,
        r"to be resident; asleep: kv_cache, weights\. Call wake_up\(\) first",
    ),
]


def ids(cases):
    return [case[0] for case in cases]


@pytest.mark.parametrize(("what", "call", "error", "words"), AWAKE, ids=ids(AWAKE))
def test_awake(llm, expected, what, call, error, words):
    with pytest.raises(error, match=words):
        call(llm)
    assert not llm.llm_engine.is_sleeping()
    assert few(llm) == expected


@pytest.mark.parametrize("level", [0, 1])
def test_generate_while_paused_or_asleep_is_refused_and_leaves_no_request(llm, expected, level):
    llm.sleep(level=level)
    with pytest.raises(SleepModeError, match=r"call wake_up\(\) before generate\(\)"):
        llm.generate("Hi")
    llm.wake_up()
    assert few(llm) == expected


@pytest.mark.parametrize(("what", "call", "error", "words"), ASLEEP, ids=ids(ASLEEP))
def test_asleep(llm, expected, what, call, error, words):
    llm.sleep(level=1)
    with pytest.raises(error, match=words):
        call(llm)
    assert llm.llm_engine.is_sleeping()
    llm.wake_up()
    assert few(llm) == expected


def test_a_second_engine_in_the_process_is_refused_and_the_first_serves_on(
    llm, tiny_model, expected
):
    with pytest.raises(ValueError, match="another engine of this process"):
        start(tiny_model, enable_sleep_mode=True)
    llm.sleep(level=1)
    llm.wake_up()
    assert few(llm) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_mib": 3}, "chunk_mib=3"),
        ({"chunk_mb": 64}, "chunk_mb=64"),
        ({"wake_timeout_s": -1}, "wake_timeout_s=-1"),
    ],
)
def test_bad_options_stop_the_engine_before_it_starts(tiny_model, options, words):
    with (
        pytest.raises(ValueError, match=words),
        engine(tiny_model, enable_sleep_mode=True, additional_config={"sleep_mode": options}),
    ):
        pass


def test_sleep_without_sleep_mode_names_the_flag(tiny_model, expected):
    with engine(tiny_model) as plain:
        for call in (plain.sleep, lambda: plain.sleep(level=2), plain.release_kv_cache_memory):
            with pytest.raises(ValueError, match="enable_sleep_mode=True"):
                call()
        with pytest.raises(ValueError, match="enable_sleep_mode=True"):
            plain.wake_up(tags=["weights"])
        for method, arguments in (("sleep", (1,)), ("sleeping_tags", ()), ("discard", (("kv",),))):
            with pytest.raises(ValueError, match="enable_sleep_mode=True"):
                plain.collective_rpc(method, args=arguments)
        assert plain.collective_rpc("sleep_status")[0]["enabled"] is False
        assert few(plain) == expected
