# SPDX-License-Identifier: Apache-2.0
"""A plain torch program on an NPU whose memory sleeps between two parts of its training.

The weights and the optimizer's state keep their content in host memory, and are restored at the
same addresses. It does not use vLLM.

    python examples/sleeping_trainer.py
"""

import argparse

import torch
import torch_npu  # noqa: F401  makes the device known to torch
from torch import nn

from vllm_sleep_ascend import memory

MIB = 1 << 20


class Trainer:
    """Learns the sums of random rows with Adam."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        self.width = width
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)]
        with memory.region("weights"):
            self.model = nn.Sequential(*layers).to("npu")
        with memory.region("optimizer"):
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
            self.train(1)  # Adam makes its state in the first step

    def train(self, steps: int) -> list[float]:
        """Run this many steps, and return their losses."""
        losses = []
        for _ in range(steps):
            x = torch.randn(64, self.width).to("npu")
            loss = ((self.model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()  # autograd allocates gradients on its own thread
            losses.append(loss.item())
        return losses


def held() -> int:
    """This process's device bytes in regions."""
    return sum(region["device"] for region in memory.status().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024, help="width of the layers (1024)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each of the two parts (3)")
    args = parser.parse_args()

    undisturbed = Trainer(args.width).train(2 * args.steps)

    trainer = Trainer(args.width)
    losses = trainer.train(args.steps)
    print(f"awake: {held() / MIB:.0f} MiB in regions")
    torch.accelerator.empty_cache()  # frees what torch caches outside the regions
    memory.sleep()
    print(f"asleep: {held() / MIB:.0f} MiB in regions; others may use the device now")
    memory.wake()
    print(f"awake again: {held() / MIB:.0f} MiB in regions")
    losses += trainer.train(args.steps)
    print("the same losses" if losses == undisturbed else f"other losses: {losses}, {undisturbed}")


if __name__ == "__main__":
    main()
