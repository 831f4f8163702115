# SPDX-License-Identifier: Apache-2.0
"""Weights that level 2 discarded and nothing loaded: ``after_level2`` warns, refuses or reloads."""

import shutil
from contextlib import contextmanager

import pytest
from helpers.engine import driver_worker, engine, few, only_rank
from helpers.logs import messages_of
from safetensors.torch import load_file, save_file

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError

LOST = "model.layers.1.mlp.down_proj.weight"


@contextmanager
def engine_with(model, after_level2: str):
    config = {"sleep_mode": {"after_level2": after_level2}}
    with engine(model, enable_sleep_mode=True, additional_config=config) as llm:
        yield llm


def without_content(llm) -> int:
    return only_rank(llm)["parameters_without_content"]


def test_warn_says_so_once_when_it_serves_and_not_before(tiny_model, expected):
    with engine_with(tiny_model, "warn") as llm, messages_of("engine.serving_gate") as warnings:
        assert without_content(llm) == 0
        llm.sleep(level=2)
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        assert (without_content(llm), warnings) == (0, [])
        assert few(llm) == expected
        assert warnings == []

        llm.sleep(level=2)
        llm.wake_up()
        total = without_content(llm)
        assert total > 20
        assert few(llm) != expected
        assert few(llm) != expected
        (warning,) = warnings
        assert f"{total} parameters have not been loaded" in warning
        assert "collective_rpc('reload_weights')" in warning
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        assert few(llm) == expected
        assert len(warnings) == 1


def test_refuse_serves_once_all_is_loaded(tiny_model, expected):
    with engine_with(tiny_model, "refuse") as llm:
        llm.sleep(level=2)
        assert llm.wake_up() is True
        with pytest.raises(SleepModeError, match=r"does not serve yet: .*'reload_weights'"):
            few(llm)
        assert not llm.llm_engine.is_sleeping()
        assert not llm.llm_engine.has_unfinished_requests()

        weights = load_file(tiny_model / "model.safetensors")
        half = [(name, tensor) for name, tensor in weights.items() if name != LOST]
        llm.collective_rpc(lambda worker: worker.model_runner.model.load_weights(half))
        assert without_content(llm) == 1
        with pytest.raises(SleepModeError, match=rf"1 parameters .*\({LOST}\)"):
            few(llm)
        rest = [(LOST, weights[LOST])]
        llm.collective_rpc(lambda worker: worker.model_runner.model.load_weights(rest))
        llm.reset_prefix_cache()
        assert few(llm) == expected

        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        assert few(llm) == expected

        # Level 1 keeps the content: none, after a level 2 without a load.
        llm.sleep(level=2)
        llm.wake_up()
        llm.sleep(level=1)
        llm.wake_up()
        with pytest.raises(SleepModeError, match="does not serve yet"):
            few(llm)
        llm.collective_rpc("mark_weights_loaded")
        assert few(llm) != expected


def test_reload_loads_all_or_says_what_is_missing_and_can_be_repeated(
    tiny_model, expected, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    file = model / "model.safetensors"
    whole = file.read_bytes()
    weights = load_file(tiny_model / "model.safetensors")
    with engine_with(model, "reload") as llm:
        for tags in (None, ["weights"], ["kv_cache"]):
            llm.sleep(level=2)
            llm.wake_up(tags=tags)
            llm.wake_up()
            llm.reset_prefix_cache()
            assert few(llm) == expected

        # Weights written between the parts of a wake are not overwritten by a load.
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        norm = driver_worker(llm).model_runner.get_model().get_parameter("model.norm.weight")
        norm.data.fill_(7)
        llm.wake_up(tags=["kv_cache"])
        assert norm.unique().tolist() == [7]

        llm.sleep(level=2)
        save_file({name: t for name, t in weights.items() if name != LOST}, file)
        with pytest.raises(SleepModeError, match=f"rank 0: wake failed: .* no weights for {LOST}"):
            llm.wake_up()
        assert llm.llm_engine.is_sleeping()
        file.unlink()
        with pytest.raises(SleepModeError, match=r"the weights cannot be loaded from .*repeated"):
            llm.wake_up()
        states = {a["tag"]: a["state"] for a in _camem.allocations() if a["device_bytes"]}
        assert "weights" not in states
        assert llm.llm_engine.is_sleeping()
        status = only_rank(llm)
        assert status["last_error"]["operation"] == "wake"

        file.write_bytes(whole)
        assert llm.wake_up() is True
        assert few(llm) == expected
        assert llm.collective_rpc("sleep_status")[0]["last_error"] is None


def test_a_load_that_fails_in_the_middle_leaves_the_weights_before_it(tiny_model, expected):
    weights = load_file(tiny_model / "model.safetensors")

    def torn():
        yield from [(name, -tensor) for name, tensor in weights.items()][:5]
        raise OSError("the trainer went away")

    def load_torn(llm):
        with pytest.raises(OSError, match="trainer went away"):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": torn()})

    with engine_with(tiny_model, "refuse") as llm:
        load_torn(llm)
        assert without_content(llm) == 0
        llm.reset_prefix_cache()
        assert few(llm) == expected
        with pytest.raises(ValueError, match="'/nowhere' is not a folder"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": "/nowhere"})
        with pytest.raises(Exception, match="snapshot folder"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": "nobody/nothing"})
        llm.sleep(level=0)
        load_torn(llm)
        assert llm.llm_engine.is_sleeping()
        llm.wake_up(tags=["scheduling"])
        assert few(llm) == expected

        # Without weights before it, it leaves none.
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        total = without_content(llm)
        load_torn(llm)
        assert without_content(llm) == total > 20
        llm.wake_up(tags=["kv_cache"])
        with pytest.raises(SleepModeError, match="does not serve yet"):
            few(llm)
        llm.collective_rpc("reload_weights")
        assert without_content(llm) == 0
        assert few(llm) == expected
