# SPDX-License-Identifier: Apache-2.0
"""New weights for an engine that sleeps: from another checkpoint, and from a trainer."""

import os

import pytest
from helpers.engine import engine, few
from helpers.reference import PROMPTS, hf_few, hf_greedy, tokenizer
from helpers.server import HBM_GIB, MEMORY, SMALL, Server
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_sleep_ascend.errors import SleepModeError

TRANSFER = {"backend": "safetensors"}


@pytest.fixture(scope="module")
def old(tiny_model):
    return hf_few(tiny_model)


@pytest.fixture(scope="module")
def new(other_model, old):
    tokens = hf_few(other_model)
    assert all(a != b for a, b in zip(tokens, old, strict=True))
    return tokens


@pytest.fixture(scope="module")
def llm(tiny_model):
    from vllm.config import WeightTransferConfig

    with engine(
        tiny_model,
        enable_sleep_mode=True,
        weight_transfer_config=WeightTransferConfig(**TRANSFER),
        additional_config={"sleep_mode": {"after_level2": "refuse"}},
    ) as llm:
        yield llm


def checksums(llm) -> dict[str, str]:
    (sums,) = llm.collective_rpc("compute_weight_checksums")
    return sums


def test_reload_weights_with_a_new_path(llm, tiny_model, other_model, old, new):
    assert few(llm) == old
    before = checksums(llm)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_model)})
    llm.wake_up(tags=["kv_cache"])
    assert few(llm) == new
    after = checksums(llm)
    assert after.keys() == before.keys()
    assert after != before

    # From the checkpoint that was loaded last; then from the first one again.
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    assert (few(llm), checksums(llm)) == (new, after)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)})
    llm.reset_prefix_cache()
    assert (few(llm), checksums(llm)) == (old, before)


def test_level_1_keeps_the_checksums(llm):
    before = checksums(llm)
    llm.sleep(level=1)
    with pytest.raises(
        SleepModeError, match="compute_weight_checksums needs memory that is asleep"
    ):
        checksums(llm)
    llm.wake_up()
    assert checksums(llm) == before


def test_a_weight_update_in_parts_between_wakes(llm, tiny_model, other_model, old, new, tmp_path):
    weights = load_file(other_model / "model.safetensors")
    names = sorted(weights)
    llm.sleep(level=2)
    with pytest.raises(SleepModeError, match="start_weight_update needs memory that is asleep"):
        llm.start_weight_update()
    llm.wake_up(tags=["weights"])
    llm.init_weight_transfer_engine({"init_info": {}})
    llm.start_weight_update()
    for part in range(3):
        path = tmp_path / f"{part}.safetensors"
        save_file({name: weights[name] for name in names[part::3]}, path)
        llm.update_weights({"update_info": {"path": str(path)}})
    # All is sent but not finished: the engine must neither serve nor sleep.
    assert llm.wake_up(tags=["kv_cache"]) is True
    with pytest.raises(SleepModeError, match="under way; call finish_weight_update"):
        few(llm)
    with pytest.raises(SleepModeError, match="under way; call finish_weight_update"):
        llm.sleep(level=1)
    llm.finish_weight_update(weight_version="step-1")
    assert llm.get_weight_version() == "step-1"
    assert few(llm) == new

    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)})
    llm.reset_prefix_cache()
    assert few(llm) == old


def test_an_update_that_fails_or_is_not_whole(llm, tiny_model, other_model, old, tmp_path):
    llm.sleep(level=2)
    llm.wake_up()
    llm.start_weight_update()
    with pytest.raises(ValueError, match="'/nowhere' is not a file that this worker can see"):
        llm.update_weights({"update_info": {"path": "/nowhere"}})
    with pytest.raises(SleepModeError, match="have not been loaded since"):
        few(llm)

    weights = load_file(other_model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "part.safetensors")
    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": str(tmp_path / "part.safetensors")}})
    llm.finish_weight_update()
    with pytest.raises(SleepModeError, match=r"1 parameters .*\(model.norm.weight\)"):
        few(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)})
    assert few(llm) == old


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_backends_for_cuda_are_refused_with_the_one_to_use(tiny_model, backend):
    from vllm.config import WeightTransferConfig

    config = WeightTransferConfig(backend=backend)
    with (
        pytest.raises(ValueError, match=rf'backend {backend}, .* "safetensors"'),
        engine(tiny_model, weight_transfer_config=config),
    ):
        pass


def test_a_trainer_whose_first_rank_lacks_weights_is_refused(tmp_path):
    """The others' weights would stay as they are, without a word."""
    import torch
    from vllm.distributed.weight_transfer import ModuleSource

    from vllm_sleep_ascend.weight_transfer import (
        SafetensorsTrainer,
        SafetensorsTrainerInitInfo,
    )

    class ElsewhereInPart(ModuleSource):
        def held_names(self):  # vLLM 0.32
            return ["weight"]

        def owned_names(self, rank):  # vLLM 0.33
            return ["weight"]

    with pytest.raises(ValueError, match=r"1 parameters are held by other ranks .*\(bias\)"):
        SafetensorsTrainer.trainer_init(
            SafetensorsTrainerInitInfo(rank=0, folder=str(tmp_path)),
            client=None,
            source=ElsewhereInPart(torch.nn.Linear(2, 2)),
        )


def test_a_trainer_updates_a_server_between_the_wakes(tiny_model, other_model, tmp_path):
    """vLLM's own trainer interface and HTTP routes, with the engine in a separate process."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource

    from vllm_sleep_ascend.weight_transfer import (
        SafetensorsTrainer,
        SafetensorsTrainerInitInfo,
    )

    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"trained-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
    }
    options = ("--enable-sleep-mode", "--weight-transfer-config", '{"backend": "safetensors"}')
    options += ("--dtype", "float32", *SMALL, *MEMORY)
    with Server(tiny_model, *options, log=tmp_path / "log", env=env) as server:
        old, new = (
            tokenizer(tiny_model).decode(hf_greedy(model, PROMPTS[2:3], 8)[0])
            for model in (tiny_model, other_model)
        )
        assert server.complete(PROMPTS[2]) == old
        before = server.post("/weight_checker", json={"action": "checksum"})["checksums"]
        server.post("/sleep?level=2")
        server.post("/wake_up?tags=weights")
        trainer = SafetensorsTrainer.trainer_init(
            SafetensorsTrainerInitInfo(rank=0, folder=str(tmp_path), part_bytes=1 << 20),
            client=HTTPVLLMWeightSyncClient(str(server.http.base_url)),
            source=ModuleSource(AutoModelForCausalLM.from_pretrained(other_model, dtype="auto")),
        )
        trainer.send_weights()
        server.post("/wake_up?tags=kv_cache")
        server.post("/reset_prefix_cache")
        assert server.complete(PROMPTS[2]) == new
        after = server.post("/weight_checker", json={"action": "checksum"})["checksums"]
        assert after.keys() == before.keys()
        assert after != before
        assert "have not been loaded" not in (tmp_path / "log").read_text()
        assert list(tmp_path.glob("weights-*")) == []
