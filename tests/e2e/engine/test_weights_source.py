# SPDX-License-Identifier: Apache-2.0
"""Each rank knows where its weights came from, and no wake replaces them with a checkpoint."""

from contextlib import contextmanager

import pytest
from helpers.engine import engine, few, mapped
from helpers.logs import messages_of
from helpers.models import make_model
from helpers.ranks import status
from helpers.reference import hf_few
from safetensors.torch import load_file
from vllm import SamplingParams

from vllm_sleep_ascend.errors import SleepModeError

TRAINED = r"the weights \(source: trainer, version: step-1\) are lost"


@pytest.fixture(scope="module")
def old(tiny_model):
    return hf_few(tiny_model)


@pytest.fixture(scope="module")
def new(other_model):
    return hf_few(other_model)


@contextmanager
def reloading_engine(model, **options):
    from vllm.config import WeightTransferConfig

    with engine(
        model,
        enable_sleep_mode=True,
        weight_transfer_config=WeightTransferConfig(backend="safetensors"),
        additional_config={"sleep_mode": {"after_level2": "reload"}},
        **options,
    ) as llm:
        llm.init_weight_transfer_engine({"init_info": {}})
        yield llm


@pytest.fixture(scope="module")
def llm(tiny_model):
    with reloading_engine(tiny_model) as llm:
        yield llm


@pytest.fixture
def from_the_start(llm, tiny_model):
    """Each test begins with the first checkpoint and without a version."""
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)})
    llm.wake_up()
    llm.reset_prefix_cache()
    assert source(llm) == ("checkpoint", str(tiny_model), "default")


def source(llm) -> tuple[str, str | None, str]:
    weights = status(llm)[0]["weights"]
    assert weights["version"] == llm.get_weight_version()
    return weights["source"], weights["path"], weights["version"]


def train(llm, model, version: str | None) -> None:
    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": str(model / "model.safetensors")}})
    llm.finish_weight_update(weight_version=version)
    llm.reset_prefix_cache()


def served_version(llm) -> str:
    (answer,) = llm.generate(["One"], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    (span,) = answer.outputs[0].weight_versions
    return span.version


@pytest.fixture
def drafting(tiny_model):
    """An engine with a draft model. A process can have only one engine, so its test precedes those
    of ``llm``."""
    options = {"model": str(make_model("tiny-qwen2-draft")), "num_speculative_tokens": 3}
    speculative = {**options, "method": "draft_model"}
    with reloading_engine(tiny_model, speculative_config=speculative) as llm:
        yield llm


def test_a_draft_model_has_a_source_of_its_own(drafting, tiny_model, old):
    def draft() -> tuple[str, str | None]:
        found = status(drafting)[0]["weights"]["draft"]
        return found["source"], found["path"]

    path = str(make_model("tiny-qwen2-draft"))
    assert draft() == ("checkpoint", path)
    drafting.start_draft_weight_update()
    drafting.update_weights({"update_info": {"path": f"{path}/model.safetensors"}})
    drafting.finish_weight_update(weight_version="draft-1")
    assert draft() == ("trainer", None)
    assert source(drafting) == ("checkpoint", str(tiny_model), "draft-1")
    drafting.sleep(level=2)
    drafting.wake_up()
    assert draft() == ("trainer", None)  # level 2 has kept it
    assert few(drafting) == old


def test_ranks_agree_on_the_source_or_the_version_is_unknown(tiny_model, other_model, new):
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with reloading_engine(tiny_model, **parallel) as llm:
        train(llm, other_model, "step-1")
        llm.sleep(level=2)
        refused = rf"rank 0, device 0: wake refused: {TRAINED}.*rank 1, device 1: wake refused"
        with pytest.raises(SleepModeError, match=refused):
            llm.wake_up()
        assert [rank["tags"]["weights"]["device"] for rank in status(llm)] == [0, 0]
        llm.wake_up(tags=["weights"])
        train(llm, other_model, "step-2")
        llm.wake_up()
        assert few(llm) == new
        assert [rank["weights"]["version"] for rank in status(llm)] == ["step-2"] * 2
        assert llm.get_weight_version() == "step-2"

        llm.collective_rpc(load_nothing_on_rank_1)
        assert [rank["weights"]["source"] for rank in status(llm)] == ["trainer", "load_weights"]
        assert served_version(llm) == llm.get_weight_version() == "unknown"


def load_nothing_on_rank_1(worker) -> None:
    if worker.rank == 1:
        worker.model_runner.model.load_weights([])


@pytest.mark.usefixtures("from_the_start")
def test_a_wake_does_not_roll_back_what_a_trainer_sent(llm, other_model, old, new):
    llm.sleep(level=2)
    llm.wake_up()
    assert few(llm) == old
    train(llm, other_model, "step-1")
    assert source(llm) == ("trainer", None, "step-1")
    llm.sleep(level=1)
    assert source(llm) == ("trainer", None, "step-1")
    llm.wake_up()
    assert (few(llm), source(llm)) == (new, ("trainer", None, "step-1"))

    llm.sleep(level=2)
    for _ in range(2):
        with pytest.raises(SleepModeError, match=f"wake refused: {TRAINED}.*Wake the tag weights"):
            llm.wake_up()
        assert (mapped("weights"), mapped("kv_cache")) == (0, 0)
        assert llm.llm_engine.is_sleeping()
    llm.wake_up(tags=["weights"])
    for tags in (None, ["kv_cache"]):
        with pytest.raises(SleepModeError, match=TRAINED):
            llm.wake_up(tags=tags)
        assert mapped("weights") > 0 and mapped("kv_cache") == 0
    train(llm, other_model, "step-2")
    llm.wake_up()
    assert (few(llm), source(llm)) == (new, ("trainer", None, "step-2"))
    assert served_version(llm) == "step-2"


@pytest.mark.usefixtures("from_the_start")
def test_an_explicit_reload_is_done_with_a_warning_and_another_version(
    llm, tiny_model, other_model, old, new
):
    train(llm, other_model, "step-1")
    llm.sleep(level=2)
    llm.wake_up(tags=["kv_cache"])
    llm.wake_up(tags=["weights"])  # awake, and nothing is served
    with pytest.raises(SleepModeError, match="have not been loaded since"):
        few(llm)
    with messages_of("rank.weights.rank_weights") as warnings:
        llm.collective_rpc("reload_weights")
    (warning,) = warnings
    assert f"loaded {tiny_model} in place of" in warning and "step-1" in warning
    assert served_version(llm) == "default"
    assert (few(llm), source(llm)) == (old, ("checkpoint", str(tiny_model), "default"))

    # The weights are awake as they are now; and level 2 may reload them again.
    llm.sleep(level=2)
    llm.wake_up()
    assert few(llm) == old


@pytest.mark.usefixtures("from_the_start")
def test_another_checkpoint_is_the_source_from_then_on(llm, other_model, new):
    path = str(other_model)
    train(llm, other_model, "step-1")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    assert served_version(llm) == path
    assert source(llm) == ("checkpoint", path, path)
    llm.llm_engine.set_weight_version("epoch-1")
    llm.sleep(level=2)
    llm.wake_up()
    assert (few(llm), source(llm)) == (new, ("checkpoint", path, "epoch-1"))
    for folder in ("nobody/nothing", "/nowhere"):
        with pytest.raises(Exception, match=r"snapshot folder|not a folder"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        assert source(llm) == ("checkpoint", path, "epoch-1")
    # A trainer that gives no version: it is not that of the checkpoint.
    train(llm, other_model, None)
    assert source(llm) == ("trainer", None, "default")


@pytest.mark.usefixtures("from_the_start")
def test_weights_from_code_are_in_no_checkpoint(llm, other_model, new):
    weights = list(load_file(other_model / "model.safetensors").items())
    ways = {
        "iterator": lambda: llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(weights)}
        ),
        "load_weights": lambda: llm.collective_rpc(
            lambda worker: worker.model_runner.model.load_weights(weights)
        ),
        "mark_weights_loaded": lambda: llm.collective_rpc("mark_weights_loaded"),
    }
    for kind, load in ways.items():
        train(llm, other_model, "step-1")
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        load()
        llm.wake_up()
        assert source(llm) == (kind, None, "default")
        if kind != "mark_weights_loaded":
            assert few(llm) == new
        llm.llm_engine.set_weight_version("mine")
        llm.sleep(level=2)
        with pytest.raises(SleepModeError, match=rf"\(source: {kind}, version: mine\) are lost"):
            llm.wake_up()
        llm.wake_up(tags=["weights"])
    # A user's call completes a load that was detected.
    train(llm, other_model, "step-2")
    llm.collective_rpc("mark_weights_loaded")
    assert source(llm) == ("trainer", None, "step-2")


@pytest.mark.usefixtures("from_the_start")
def test_a_load_that_broke_off_keeps_the_source(llm, tiny_model, other_model, old):
    weights = list(load_file(other_model / "model.safetensors").items())

    def torn():
        yield from weights[:5]
        raise OSError("the trainer went away")

    with pytest.raises(OSError, match="trainer went away"):
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": torn()})
    assert source(llm) == ("checkpoint", str(tiny_model), "default")
    llm.sleep(level=2)
    llm.wake_up()
    assert few(llm) == old
