# SPDX-License-Identifier: Apache-2.0
"""KV connectors: one whose blocks would become stale is refused, and one that can be emptied serves
no keys and values of old weights."""

import pytest
from helpers.engine import engine, tokens
from helpers.faults import DRIVER_ERROR
from helpers.models import other_weights
from helpers.reference import PROMPTS, hf_greedy

from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.sim import control

LONG = PROMPTS[-2:]  # prompts of several blocks


def with_connector(name: str, folder, module: str | None = "helpers.connectors") -> dict:
    return {
        "kv_transfer_config": {
            "kv_connector": name,
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        }
    }


def configure(model, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), max_model_len=512, **options).create_engine_config()


@pytest.mark.parametrize(
    "name,module,reason",
    [
        ("ExampleConnector", None, "ExampleConnector .*cannot be emptied"),
        ("DecodeBenchConnector", None, "DecodeBenchConnector .*register_kv_caches"),
        (
            "RegisteringConnector",
            "helpers.connectors",
            "RegisteringConnector .*lacks unregister",
        ),
        ("SomeConnector", "no.such.module", "SomeConnector .*cannot be imported"),
    ],
)
def test_connectors_that_would_be_stale_are_refused(tiny_model, tmp_path, name, module, reason):
    options = with_connector(name, tmp_path, module)
    with pytest.raises(ValueError, match=rf"{reason}.*leave out --kv-transfer-config"):
        configure(tiny_model, enable_sleep_mode=True, **options)


def test_connectors_without_sleep_mode_are_the_users_choice(tiny_model, tmp_path):
    config = configure(tiny_model, **with_connector("ExampleConnector", tmp_path, None))
    assert config.kv_transfer_config.kv_connector == "ExampleConnector"


@pytest.mark.parametrize("sleeps", [False, True])
@pytest.mark.parametrize("backend", ["native", "lmcache"])
def test_offloading_is_refused_before_weights_are_read(tiny_model, backend, sleeps):
    options = {"kv_offloading_size": 1, "kv_offloading_backend": backend}
    with pytest.raises(ValueError, match=f"{backend}.*needs CUDA; leave out --kv-offloading-size"):
        configure(tiny_model, enable_sleep_mode=sleeps, **options)


def test_offloading_connectors_are_refused_by_name(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="KV connector OffloadingConnector, which needs CUDA"):
        configure(tiny_model, **with_connector("OffloadingConnector", tmp_path, None))


def test_no_keys_and_values_of_old_weights_are_served(tiny_model, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    other = other_weights(tiny_model, tmp_path / "other")
    old, new = (hf_greedy(model, LONG, 8) for model in (tiny_model, other))
    assert old != new

    options = with_connector("EmptiedConnector", store)
    options["max_num_batched_tokens"] = 2048  # the connector does not store chunked prompts
    with engine(tiny_model, enable_sleep_mode=True, **options) as llm:

        def serves(expected) -> None:
            """Computed, then with the connector's blocks (all but the last one)."""
            for _ in range(2):
                assert tokens(llm, LONG, 8) == expected
                assert len(list(store.iterdir())) == len(LONG)
                llm.llm_engine.engine_core.engine_core.scheduler.reset_prefix_cache()

        serves(old)
        for sleep in (
            lambda: llm.sleep(level=2),
            lambda: llm.collective_rpc("sleep", kwargs={"level": 2}),
        ):
            sleep()
            assert list(store.iterdir()) == []
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
            llm.wake_up(tags=["kv_cache"])
            assert tokens(llm, LONG, 8) == new
            serves(new)

            # New weights without a sleep: the recipe's last call empties both caches.
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)})
            assert llm.reset_prefix_cache()
            serves(old)

        llm.sleep(level=1)
        llm.wake_up()
        serves(old)


def test_what_a_connector_registered_is_taken_back_while_the_cache_sleeps(tiny_model, tmp_path):
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.v1.engine.core import EngineCore

    # vLLM 0.32 publishes what peers need at the start alone.
    publishes = hasattr(EngineCore, "_set_kv_connector_handshake_metadata")
    store = tmp_path / "store"
    store.mkdir()
    options = with_connector("UnregisteringConnector", store)
    options["max_num_batched_tokens"] = 2048
    with engine(tiny_model, enable_sleep_mode=True, **options) as llm:
        before, connector = tokens(llm, LONG, 8), get_kv_transfer_group()
        assert connector.told == ["register"]

        def told() -> list[str]:
            told, connector.told = connector.told, []
            return told

        def published() -> list[int]:
            numbers = [ranks[0].number for ranks in connector.published]
            connector.published.clear()
            return numbers

        told()
        assert published() == [1]
        llm.sleep(level=1)
        assert told() == ["unregister"]
        llm.wake_up(tags=["weights"])
        assert told() == published() == []
        llm.wake_up(tags=["kv_cache"])
        assert told() == ["restore"]
        assert published() == ([2] if publishes else [])
        assert tokens(llm, LONG, 8) == before

        llm.sleep(level=0)
        llm.release_kv_cache_memory()
        assert told() == ["unregister"]
        llm.wake_up()
        assert told() == ["restore"]

        control.set_faults(f"aclrtUnmapMem:1:{DRIVER_ERROR}")
        with pytest.raises(SleepModeError):
            llm.sleep(level=1)
        control.set_faults("")
        assert told() == ["unregister", "restore"]
        assert tokens(llm, LONG, 8) == before

        connector.trouble = "no route to the peer"
        control.set_faults(f"aclrtUnmapMem:1:{DRIVER_ERROR}")
        with pytest.raises(SleepModeError, match=r"aclrtUnmapMem.*no route to the peer; repeat"):
            llm.sleep(level=1)
        control.set_faults("")
        with pytest.raises(SleepModeError):
            tokens(llm, LONG, 8)
        llm.wake_up()
        assert told() == ["unregister", "restore"]
        assert tokens(llm, LONG, 8) == before

        llm.sleep(level=1)
        connector.trouble = "no route to the peer"
        with pytest.raises(SleepModeError, match="no route to the peer; repeat the wake"):
            llm.wake_up()
        assert llm.llm_engine.is_sleeping()
        llm.wake_up()
        assert told() == ["unregister", "restore"]
        assert tokens(llm, LONG, 8) == before
