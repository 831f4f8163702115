# SPDX-License-Identifier: Apache-2.0
"""A Ray actor that trains the policy on its device, and frees the device in between."""

import copy
from typing import Any

from rlhf.timeline import MemoryLog

# Only the actor imports torch, transformers and vLLM: the driver needs none of them.

LEARNING_RATE = 1e-3

Sample = tuple[list[int], list[int], float]
"""Tokens of the prompt and of the completion, and the completion's advantage."""


class Trainer:
    """A rank of data-parallel training: the policy in float32, trained by REINFORCE."""

    def __init__(self, model: str, rank: int, world: int, address: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch: Any = torch
        self.rank, self.world = rank, world
        if world > 1:
            # Ray makes one device visible to each rank.
            torch.distributed.init_process_group("hccl", address, rank=rank, world_size=world)
        self.memory = MemoryLog(self.torch.npu.mem_get_info)
        auto_model: Any = AutoModelForCausalLM
        self.policy = auto_model.from_pretrained(model, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE)
        self.outgoing = copy.deepcopy(self.policy).to(torch.bfloat16)  # as the engine computes

    def connect(self, engine: Any) -> None:
        """Become the rank that sends weights to the engine."""
        from vllm.distributed.weight_transfer import ModuleSource, RayVLLMWeightSyncClient

        from vllm_sleep_ascend.weight_transfer import SafetensorsTrainer, SafetensorsTrainerInitInfo

        self.sender = SafetensorsTrainer.trainer_init(
            SafetensorsTrainerInitInfo(rank=self.rank),
            client=RayVLLMWeightSyncClient(engine),
            source=ModuleSource(self.outgoing),
        )

    def train(self, samples: list[Sample]) -> float:
        """Do one step, and return the loss."""
        self._move("npu")
        loss = self._step(samples)
        self._move("cpu")
        self.torch.npu.empty_cache()
        return loss

    def _move(self, device: str) -> None:
        self.policy.to(device)
        for state in self.optimizer.state.values():
            state.update({name: state[name].to(device) for name in ("exp_avg", "exp_avg_sq")})

    def _step(self, samples: list[Sample]) -> float:
        torch, losses = self.torch, []
        for prompt, completion, advantage in samples:
            ids = torch.tensor([prompt + completion], device="npu")
            logits = self.policy(ids).logits[0, len(prompt) - 1 : -1]
            log_probs = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
            losses.append(-advantage * log_probs.mean())
        loss = torch.stack(losses).mean()
        loss.backward()
        if self.world > 1:
            for parameter in self.policy.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def send_weights(self) -> None:
        """Send the current weights to the engine."""
        self.outgoing.load_state_dict(self.policy.state_dict())
        self.sender.send_weights()

    def save(self, folder: str) -> None:
        """Write a checkpoint of the weights that were sent last."""
        self.outgoing.save_pretrained(folder)

    def used_bytes(self) -> int:
        """Device bytes in use by all processes."""
        return self.memory.used_bytes()

    def memory_log(self) -> MemoryLog:
        """The samples of the device's memory so far."""
        return self.memory
