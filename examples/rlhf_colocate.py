# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning with the trainer and vLLM taking turns on the same NPUs.

    python examples/rlhf_colocate.py MODEL                           # on an NPU
    python examples/rlhf_colocate.py MODEL --tensor-parallel-size 2  # on two
    npu-sim python examples/rlhf_colocate.py MODEL                   # on a simulated one

It uses Ray, a trainer per device (data parallel over HCCL), and one engine over all devices. The
engine samples, then sleeps at level 2 and leaves the devices to the trainers, which do a step of
REINFORCE with letters as the reward. The engine's weights wake and are overwritten with the new
ones, then its KV cache wakes. At the end a new engine loads the trainer's checkpoint: its tokens
must equal those of the engine that was updated in place.
"""

import argparse
import json
import socket
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rlhf.engine import Engine
from rlhf.timeline import MIB, MemoryLog, Phases, draw
from rlhf.trainer import Trainer

SHARE = 0.3  # of a device in Ray: each has a trainer and ranks of two engines


def start_ray(devices: int, log_to_driver: bool) -> Any:
    """Start a local cluster; returns a placement group with a bundle for each device."""
    ray.init(
        num_cpus=devices,
        resources={"NPU": devices},
        include_dashboard=False,
        object_store_memory=80 * MIB,
        log_to_driver=log_to_driver,
        runtime_env={
            "env_vars": {
                "VLLM_RAY_PER_WORKER_GPUS": str(SHARE),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine stays in its actor
            }
        },
    )
    return placement_group([{"CPU": 1, "NPU": 1}] * devices, strategy="STRICT_PACK")


def start_trainers(group: Any, model: str, devices: int) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    actor: Any = ray.remote(num_cpus=0, resources={"NPU": SHARE})(Trainer)
    return [
        actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote(
            model, rank, devices, address
        )
        for rank in range(devices)
    ]


def start_engine(group: Any, *args: Any) -> Any:
    actor: Any = ray.remote(num_cpus=0)(Engine)
    where = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    return actor.options(scheduling_strategy=where).remote(*args)


def advantages(texts: list[str]) -> tuple[list[float], float]:
    """The advantage of each text over the mean, in standard deviations, and the mean reward."""
    rewards = [sum(map(str.isalpha, text)) / max(len(text), 1) for text in texts]
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    return [(reward - mean) / (deviation + 1e-6) for reward in rewards], mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="number of devices")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.6, help="engine's share of a device")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw the memory over time")
    parser.add_argument("--logs", action="store_true", help="show the logs of all processes")
    args = parser.parse_args()
    model, devices = str(args.model.resolve(strict=True)), args.tensor_parallel_size

    group = start_ray(devices, args.logs)
    trainers = start_trainers(group, model, devices)
    engine = start_engine(group, model, model, devices, args.memory)

    def does(actor: Any, method: str, *given: Any) -> Any:
        return ray.get(getattr(actor, method).remote(*given))

    def each(method: str, *given: Any) -> list[Any]:
        return ray.get([getattr(trainer, method).remote(*given) for trainer in trainers])

    does(trainers[0], "connect", engine)
    before = does(engine, "rollout", None)
    phases = Phases(partial(each, "used_bytes"))
    rewards, losses = [], []
    for step in range(args.steps):
        with phases("rollout"):
            rollout = does(engine, "rollout", step)
        with phases("sleep"):
            status = does(engine, "sleep", 2)
        assert not any(tag["device"] for rank in status for tag in rank["tags"].values()), status
        gains, reward = advantages([text for _, _, text in rollout])
        samples = [(p, c, gain) for (p, c, _), gain in zip(rollout, gains, strict=True)]
        with phases("train"):
            steps = [t.train.remote(samples[i::devices]) for i, t in enumerate(trainers)]
            losses.append(sum(ray.get(steps)) / devices)
        with phases("wake weights"):
            does(engine, "wake_up", "weights")
        with phases("update"):
            does(trainers[0], "send_weights")
        with phases("wake KV cache"):
            does(engine, "wake_up", "kv_cache")
        rewards.append(reward)
        print(f"step {step}: mean reward {reward:.3f}, loss {losses[-1]:+.4f}", flush=True)

    with phases("rollout"):
        after = does(engine, "rollout", None)
        samples = does(engine, "rollout", args.steps)
    rewards.append(advantages([text for _, _, text in samples])[1])
    print(f"now:    mean reward {rewards[-1]:.3f}")
    with phases("sleep"):
        does(engine, "sleep", 1)
    logs: list[MemoryLog] = each("memory_log")
    with tempfile.TemporaryDirectory() as folder:
        does(trainers[0], "save", folder)
        fresh = does(start_engine(group, folder, model, devices, args.memory), "rollout", None)
    ray.shutdown()
    assert before != after, "the rollouts are not those of new weights"
    assert after == fresh, "the updated engine and a fresh one with the checkpoint do not agree"
    print("The updated engine answers as a fresh one with the trained checkpoint.")

    phases.add_peaks(logs)
    phases.print_table()
    if args.json:
        tokens = [completion for _, completion, _ in after]
        figures = {"rewards": rewards, "losses": losses, "tokens": tokens}
        args.json.write_text(json.dumps({**figures, "phases": phases.records}, indent=1) + "\n")
    if args.plot:
        draw(args.plot, logs, phases.records)


if __name__ == "__main__":
    main()
