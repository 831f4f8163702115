# SPDX-License-Identifier: Apache-2.0
"""Only loaded weights are served: an update is complete or rolled back, and only what was written
counts as loaded."""

import pytest
import torch
from helpers.engine import driver_worker, engine, few, send_update
from helpers.models import make_model, other_weights
from helpers.reference import FEW, FEW_TOKENS, hf_few
from safetensors.torch import load_file

from vllm_sleep_ascend.errors import SleepModeError, WeightsError
from vllm_sleep_ascend.weight_transfer import SafetensorsEngine, SafetensorsUpdateInfo

KEY = "model.layers.0.self_attn.k_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.1.self_attn.v_proj.bias"
EXPERT = "model.layers.1.mlp.experts.1.up_proj.weight"


@pytest.fixture(scope="module")
def model_with_tensors() -> str:
    """The name of a model with tensors that are neither parameters nor buffers."""
    from vllm import ModelRegistry
    from vllm.config import VllmConfig
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    class WithTensors(Qwen2ForCausalLM):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.table = torch.arange(128, dtype=torch.float32)
            self.tables = {"odd": [torch.ones(3, dtype=torch.bfloat16)]}

    ModelRegistry.register_model("WithTensors", WithTensors)
    return "WithTensors"


@pytest.fixture(scope="module", params=["tiny-qwen2", "tiny-qwen3-moe"])
def case(request, tmp_path_factory, model_with_tensors):
    """An engine, its weights and those of another checkpoint, and the tokens of both."""
    from vllm.config import WeightTransferConfig

    model = make_model(request.param)
    other = other_weights(model, tmp_path_factory.mktemp("other") / "model")
    dense = request.param == "tiny-qwen2"
    with engine(
        model,
        enable_sleep_mode=True,
        weight_transfer_config=WeightTransferConfig(backend="safetensors"),
        **({"hf_overrides": {"architectures": [model_with_tensors]}} if dense else {}),
    ) as llm:
        llm.init_weight_transfer_engine({"init_info": {}})
        case = Case(llm, model, other, (KEY, UP, BIAS) if dense else (KEY, EXPERT))
        del llm
        yield case
        case.llm = None  # so that no frame keeps the engine's memory


class Direct(SafetensorsEngine):
    """Writes files directly into the model's parameters."""

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: SafetensorsUpdateInfo) -> None:
        parameters = dict(self.model.named_parameters())
        for name, weight in load_file(update_info.path).items():
            parameters[name].data.copy_(weight)

    def finish_weight_update(self) -> None:
        pass


class Case:
    def __init__(self, llm, model, other, shards) -> None:
        self.llm, self.shards = llm, shards
        self.weights = load_file(other / "model.safetensors")
        self.old, self.new = hf_few(model), hf_few(other)
        assert all(a != b for a, b in zip(self.old, self.new, strict=True))

    def tokens(self):
        self.llm.reset_prefix_cache()
        return few(self.llm)

    def update(self, folder, lacking=()) -> None:
        weights = {name: w for name, w in self.weights.items() if name not in lacking}
        assert len(weights) == len(self.weights) - len(lacking)
        send_update(self.llm, weights, folder)

    def reload(self) -> None:
        self.llm.collective_rpc("reload_weights")


def test_an_update_that_lacks_a_shard_leaves_the_weights_before_it(case, tmp_path):
    assert case.tokens() == case.old
    for lacking in ((shard,) for shard in case.shards):
        with pytest.raises(WeightsError, match=rf"no weights for {lacking[0]}; .* before it"):
            case.update(tmp_path, lacking)
        assert case.tokens() == case.old
    case.llm.start_weight_update()
    with pytest.raises(SleepModeError, match="under way; call finish_weight_update"):
        few(case.llm)
    case.llm.finish_weight_update()  # an empty update changes nothing
    assert case.tokens() == case.old
    case.update(tmp_path)
    assert case.tokens() == case.new
    case.reload()
    assert case.tokens() == case.old


def test_an_update_that_brings_a_shard_twice_is_rolled_back(case):
    """vLLM counts elements, so the duplicate would hide a missing shard."""
    twice = [(name, w) for name, w in case.weights.items() for _ in range(1 + ("q_proj" in name))]
    with pytest.raises(WeightsError, match=r"brings .*q_proj.* twice; .* before it"):
        case.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(twice)})
    assert case.tokens() == case.old


def test_requests_under_way_wait_for_the_end_of_an_update(case):
    from vllm import SamplingParams

    engine = case.llm.llm_engine
    case.llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=FEW_TOKENS, ignore_eos=True)
    engine.add_request("under way", FEW[0], params)
    engine.step()
    case.llm.start_weight_update()
    with pytest.raises(SleepModeError, match=r"mode='wait'\) refused: .* finish_weight_update"):
        case.llm.sleep(level=0, mode="wait")
    with pytest.raises(SleepModeError, match="sleep refused: a weight update is under way"):
        case.llm.sleep(level=1)  # nothing was aborted
    case.llm.finish_weight_update()
    answers = []
    while engine.has_unfinished_requests():
        answers = engine.step() or answers
    assert list(answers[0].outputs[0].token_ids) == case.old[0]


def test_an_update_after_level_2_that_lacks_a_shard_is_not_served(case, tmp_path):
    llm = case.llm
    for shard in case.shards:
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        with pytest.raises(WeightsError, match=rf"no weights for {shard}; .* once all"):
            case.update(tmp_path, (shard,))
        llm.wake_up(tags=["kv_cache"])
        with pytest.raises(SleepModeError, match="have not been loaded since"):
            few(llm)
        case.update(tmp_path)
        assert case.tokens() == case.new
    case.reload()
    assert case.tokens() == case.old


def test_what_user_code_writes_counts_to_the_byte(case):
    """As RL frameworks do, into the parameters or through the model's own loader."""
    llm, model = case.llm, driver_worker(case.llm).model_runner.get_model()
    content = {name: parameter.cpu() for name, parameter in model.named_parameters()}

    def write(worker):
        for name, parameter in worker.model_runner.get_model().named_parameters():
            parameter.data.copy_(content[name])

    llm.sleep(level=2)
    llm.wake_up()
    with pytest.raises(SleepModeError, match=f"{len(content)} parameters"):
        few(llm)
    llm.collective_rpc(write)
    assert case.tokens() == case.old

    # All but the rows of one shard, which the error names.
    name = "model.layers.0.self_attn.qkv_proj.weight"
    query, key, _ = model.get_submodule(name.rpartition(".")[0]).output_partition_sizes

    def write_but_the_key(worker):
        write(worker)
        worker.model_runner.get_model().get_parameter(name).data[query : query + key] = kept

    llm.sleep(level=2)
    llm.wake_up()
    kept = model.get_parameter(name)[query : query + key].clone()  # without content
    llm.collective_rpc(write_but_the_key)
    with pytest.raises(SleepModeError, match=rf"1 parameters .*\({KEY}\)"):
        few(llm)
    weights = load_file(llm.model_config.model + "/model.safetensors")
    llm.collective_rpc(lambda worker: worker.model_runner.model.load_weights([(KEY, weights[KEY])]))
    assert case.tokens() == case.old


def test_a_load_by_user_code_after_one_that_left_a_layer_out_writes_all(case, tmp_path):
    """vLLM would silently drop the biases of that layer."""
    from vllm.model_executor.model_loader import reload

    def load(worker):
        worker.model_runner.get_model().load_weights(case.weights.items())

    def load_a_norm_layerwise(worker):
        model = worker.model_runner.get_model()
        reload.initialize_layerwise_reload(model)
        model.load_weights([norm])
        reload.finalize_layerwise_reload(model, worker.model_config)

    llm, norm = case.llm, ("model.norm.weight", case.weights["model.norm.weight"])
    lacking = case.weights.keys() - {norm[0]}
    for leave_out in (
        lambda: case.update(tmp_path, lacking),
        lambda: llm.collective_rpc(load_a_norm_layerwise),
    ):
        leave_out()
        llm.collective_rpc(load)
        assert case.tokens() == case.new
        case.reload()

    llm.sleep(level=2)
    llm.wake_up()
    with pytest.raises(WeightsError, match="no weights for"):
        case.update(tmp_path, case.shards[-1:])
    llm.collective_rpc(load)
    assert case.tokens() == case.new
    case.reload()


def test_a_load_by_parameter_is_whole_or_rolled_back(case):
    """In the kernels' format, without the loaders: a partial layer, and an interrupted load."""
    llm, model = case.llm, driver_worker(case.llm).model_runner.get_model()

    def load(weights) -> None:
        kwargs = {"weights_iterator": weights, "is_checkpoint_format": False}
        llm.collective_rpc("reload_weights", kwargs=kwargs)

    old = {name: parameter.cpu() for name, parameter in model.named_parameters()}
    case.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": case.weights.items()})
    new = {name: parameter.cpu() for name, parameter in model.named_parameters()}
    load(iter(old.items()))
    assert case.tokens() == case.old

    experts = [name for name in new if "w13_weight" in name]
    lacking = experts[0] if experts else "model.layers.1.self_attn.qkv_proj.bias"
    part = {name: weight for name, weight in new.items() if name != lacking}

    def torn():
        yield from part.items()
        raise OSError("the folder is gone")

    for weights, error, said in (
        (iter(part.items()), WeightsError, rf"no weights for {lacking}; .* before it"),
        (torn(), OSError, "the folder is gone"),
    ):
        with pytest.raises(error, match=said):
            load(weights)
        assert case.tokens() == case.old

    llm.sleep(level=2)
    llm.wake_up()
    with pytest.raises(WeightsError, match=f"no weights for {lacking}; .* once all"):
        load(iter(part.items()))
    with pytest.raises(SleepModeError, match=r"1 parameters have not been loaded since"):
        few(llm)
    load(iter(new.items()))
    assert case.tokens() == case.new
    case.reload()


def test_an_update_past_the_loaders_is_whole_or_rolled_back(case, tmp_path):
    """With a backend that writes directly into the parameters."""
    worker = driver_worker(case.llm)
    model, usual = worker.model_runner.get_model(), worker.weight_transfer_engine
    old = {name: parameter.cpu() for name, parameter in model.named_parameters()}
    case.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": case.weights.items()})
    new = {name: parameter.cpu() for name, parameter in model.named_parameters()}
    case.reload()

    config = worker.vllm_config
    direct = Direct(config.weight_transfer_config, config, worker.device, model)
    worker.weight_transfer_engine = direct
    try:
        with pytest.raises(KeyError, match="no such parameter"):
            send_update(case.llm, {**new, "no such parameter": torch.ones(1)}, tmp_path)
        assert case.tokens() == case.old

        case.llm.sleep(level=2)
        case.llm.wake_up()
        missing = "model.layers.1.self_attn.o_proj.weight"
        send_update(case.llm, {name: w for name, w in new.items() if name != missing}, tmp_path)
        with pytest.raises(SleepModeError, match=rf"1 parameters .*\({missing}\)"):
            few(case.llm)
        send_update(case.llm, {missing: new[missing]}, tmp_path)
        assert case.tokens() == case.new
        send_update(case.llm, old, tmp_path)
        assert case.tokens() == case.old
    finally:
        worker.weight_transfer_engine = usual


def test_tensors_that_are_no_parameters_and_no_buffers_survive_level_2(case):
    model = driver_worker(case.llm).model_runner.get_model()
    if not hasattr(model, "tables"):
        pytest.skip("the other model has none")
    for levels in ((2,), (1, 2)):
        for level in levels:
            case.llm.sleep(level=level)
        case.llm.wake_up(tags=["weights"])
        assert model.table.sum().item() == 127 * 64
        assert model.tables["odd"][0].tolist() == [1, 1, 1]
        case.reload()
        case.llm.wake_up()
        assert case.tokens() == case.old
