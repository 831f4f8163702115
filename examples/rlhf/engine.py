# SPDX-License-Identifier: Apache-2.0
"""A Ray actor that samples with vLLM. The engine's ranks are actors in the same placement group."""

from typing import Any

# Only the actor imports vLLM: the driver does not need it.
PROMPTS = ("Once upon a time", "def main(argv):", "The quick brown fox", "1 + 1 =")
SAMPLES = 4  # per prompt
TOKENS = 24

Rollout = tuple[list[int], list[int], str]
"""Tokens of the prompt and of the completion, and the completion's text."""


class Engine:
    """vLLM with sleep mode and weight transfer over all devices."""

    def __init__(self, model: str, tokenizer: str, ranks: int, memory: float) -> None:
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        self.llm = LLM(
            model,
            tokenizer=tokenizer,
            dtype="bfloat16",
            tensor_parallel_size=ranks,
            distributed_executor_backend="ray",
            enable_sleep_mode=True,
            weight_transfer_config=WeightTransferConfig(backend="safetensors"),
            gpu_memory_utilization=memory,
            max_model_len=512,
            max_num_batched_tokens=512,
        )

    def rollout(self, seed: int | None) -> list[Rollout]:
        """Samples of every prompt; without a seed, the greedy completion of each."""
        from vllm import SamplingParams

        sampled = {"temperature": 1.0, "n": SAMPLES, "seed": seed}
        options: dict[str, Any] = {"temperature": 0.0} if seed is None else sampled
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **options)
        return [
            (list(request.prompt_token_ids or ()), list(output.token_ids), output.text)
            for request in self.llm.generate(list(PROMPTS), params, use_tqdm=False)
            for output in request.outputs
        ]

    def sleep(self, level: int) -> list[dict[str, Any]]:
        """Sleep, and return what each rank still holds."""
        self.llm.sleep(level=level)
        return self.llm.collective_rpc("sleep_status")

    def wake_up(self, tag: str) -> None:
        self.llm.wake_up(tags=[tag])

    # vLLM's RayVLLMWeightSyncClient calls these for a trainer.

    def init_weight_transfer_engine(self, request: Any) -> None:
        self.llm.init_weight_transfer_engine(request)

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, request: Any) -> None:
        self.llm.update_weights(request)

    def finish_weight_update(self) -> None:
        self.llm.finish_weight_update()
