# SPDX-License-Identifier: Apache-2.0
"""From vLLM's model_executor/test_sleep_mode_tensor_ownership.py: tensors besides parameters."""

import pytest
import torch
from helpers.engine import driver_worker, engine, few
from helpers.models import make_model
from helpers.reference import hf_few


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-qwen3-moe"])
def test_static_model_tensors_survive_level2_restore(name):
    """Scales, soft caps, rotary tables and expert maps, which no checkpoint contains."""
    model = make_model(name)
    expected = hf_few(model)
    with engine(model, enable_sleep_mode=True) as other:
        for _ in range(2):
            other.sleep(level=2)
            other.wake_up(tags=["weights"])
            other.collective_rpc("reload_weights")
            other.wake_up(tags=["kv_cache"])
            assert few(other) == expected


GEMMA_3N = {
    "architectures": ["Gemma3nForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": [128, 128, 128],
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 1,
    "laurel_rank": 16,
    "activation_sparsity_pattern": [0.0, 0.0, 0.0],
}
SCALES = ("router_input_scale", "embed_scale", "per_layer_input_scale")
SCALES += ("embed_scale_per_layer", "per_layer_projection_scale")


def test_static_tensors_of_gemma_3n_survive_level2_restore(tmp_path):
    """Its scales are no parameters. Upstream's case has no checkpoint: its weights are random ones,
    which are kept on the host and sent back."""
    from transformers import Gemma3nTextConfig
    from vllm import SamplingParams, TokensPrompt

    def scales(llm):
        return {
            f"{path}.{name}": (value.data_ptr(), value.cpu())
            for path, module in driver_worker(llm).model_runner.get_model().named_modules()
            for name in SCALES
            if isinstance(value := getattr(module, name, None), torch.Tensor)
        }

    def answer(llm):
        params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
        prompt = TokensPrompt(prompt_token_ids=[2, 5, 9, 12, 7, 3])
        return list(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)

    Gemma3nTextConfig(**GEMMA_3N).save_pretrained(tmp_path)
    random = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 128}
    with engine(tmp_path, enable_sleep_mode=True, **random) as llm:
        expected, before = answer(llm), scales(llm)
        assert {name.split(".")[-1] for name in before} == set(SCALES)
        network = driver_worker(llm).model_runner.get_model()
        weights = [(name, weight.cpu()) for name, weight in network.named_parameters()]
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        after = scales(llm)
        assert all(after[name][0] == address for name, (address, _) in before.items())
        assert all(after[name][1].equal(value) for name, (_, value) in before.items())
        llm.collective_rpc(
            lambda worker: worker.reload_weights(
                weights_iterator=iter(weights), is_checkpoint_format=False
            )
        )
        llm.wake_up(tags=["kv_cache"])
        assert answer(llm) == expected
