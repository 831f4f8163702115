# SPDX-License-Identifier: Apache-2.0
"""The common protocol of the five experiments: two models take turns on one device.

With sleep mode, A is loaded, warmed up with one token and put to sleep, and then B. Each round
wakes A, prompts it and puts it to sleep, and does the same with B. Without sleep mode, each round
starts, prompts and stops A, then B.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from options import chosen, models, parser, serve_options
from recorder import Recorder
from servers import ExperimentFailed, Model

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.client.sleep_client import SleepClient


@dataclass(frozen=True)
class Arm:
    """One side of an experiment.

    Args:
        level: sleep level; None for servers that are started and stopped each time.
        warmup: whether a newly loaded model generates one token before it sleeps.
        options: options of ``vllm serve`` for both models.
    """

    level: int | None
    warmup: bool = True
    options: tuple[str, ...] = ()


class Experiment:
    """A run of one arm."""

    def __init__(
        self, args: argparse.Namespace, arm: Arm, record: Recorder, models: list[Model]
    ) -> None:
        self.args = args
        self.arm = arm
        self.record = record
        self.models = models

    async def run(self) -> None:
        # Like Ctrl-C, so that the servers end with the experiment.
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            level = self.arm.level
            await (self._with_sleep(level) if level else self._without_sleep())
        finally:
            for model in self.models:
                await model.stop()
        self.record.done()

    async def _with_sleep(self, level: int) -> None:
        for model in self.models:
            await self._load(model)
            await self._sleep(model, level, "first sleep")
        for number in range(1, self.args.rounds + 1):
            for model in self.models:
                waited = await self._wake(model, level, number)
                await self._prompt(model, number, waited)
                await self._sleep(model, level, "sleep", round=number)
        for model in self.models:
            await self._end(model)

    async def _without_sleep(self) -> None:
        for number in range(1, self.args.rounds + 1):
            for model in self.models:
                waited = await model.start()
                self.record.event("load", model, waited, round=number, **await model.memory())
                await self._prompt(model, number, waited)
                await self._end(model, round=number)

    async def _end(self, model: Model, **more: Any) -> None:
        started = time.perf_counter()
        await model.stop()
        self.record.event("terminate", model, time.perf_counter() - started, **more)

    async def _load(self, model: Model) -> None:
        seconds = await model.start()
        self.record.event("load", model, seconds, **await model.memory())
        if self.arm.warmup:
            answer = await model.complete(1)
            # From the start of the process, without the query of the memory in between.
            since_start = seconds + answer.first_token_s
            more = {"first_token_s": round(since_start, 4), **await model.memory()}
            self.record.event("warm up", model, answer.seconds, **more)

    async def _sleep(self, model: Model, level: int, name: str, **more: Any) -> None:
        before = await model.memory()
        async with SleepClient(model.url) as client:
            started = time.perf_counter()
            await client.sleep(level)
            seconds = time.perf_counter() - started
            found = await client.level()
            told = await client.reports_memory()
        after = await model.memory()
        if told:
            check_level(model, level, found, before, after)
        self.record.event(name, model, seconds, level_verified=told, **more, **after)

    async def _wake(self, model: Model, level: int, number: int) -> float:
        async with SleepClient(model.url) as client:
            started = time.perf_counter()
            await client.wake_to_serve(slept_at=level)
            seconds = time.perf_counter() - started
            steps = {step["step"]: step["seconds"] for step in client.steps}
        self.record.event("wake", model, seconds, round=number, steps=steps, **await model.memory())
        return seconds

    async def _prompt(self, model: Model, number: int, waited: float) -> None:
        answer = await model.complete(self.args.tokens)
        if model.expected is None:
            model.expected = answer.text
        if answer.text != model.expected:
            raise ExperimentFailed(
                f"{model.name} answered {answer.text!r} in round {number}, and before "
                f"{model.expected!r}"
            )
        self.record.event(
            "prompt",
            model,
            answer.seconds,
            round=number,
            first_token_s=round(answer.first_token_s, 4),
            switch_to_first_token_s=round(waited + answer.first_token_s, 4),
            tokens=answer.tokens,
            tokens_per_s=round(answer.tokens / answer.seconds, 2),
            text_is_the_first=True,
            **await model.memory(),
        )


def check_level(model: Model, wanted: int, level: int, before: dict, after: dict) -> None:
    """
    Raises:
        ExperimentFailed: by its memory, the server does not sleep at the requested level.
    """
    freed = before["device_used"] - after["device_used"]
    backup_is_right = (after["weights_backup"] > 0) == (wanted == 1)
    if level != wanted or after["weights_device"] or not backup_is_right:
        raise ExperimentFailed(f"{model.name} sleeps at level {level}, not {wanted}: {after}")
    if freed < before["weights_device"]:
        raise ExperimentFailed(f"{model.name}: only {freed} bytes of the device came free")


def main(
    description: str, experiment: str, arms: dict[str, Arm], default: str | None = None
) -> int:
    """Run the arm from the command line, and return the exit code.

    Args:
        description: its first line is shown by ``--help``.
        experiment: its name in the report.
        default: the arm that runs without an argument.
    """
    arguments = parser(description.split("\n")[0])
    arguments.add_argument("arm", nargs="?" if default else None, choices=arms, default=default)
    args = arguments.parse_args()
    arm = arms[args.arm]
    serve = [*serve_options(args), *arm.options]
    if arm.level is not None:
        serve.append("--enable-sleep-mode")
    try:
        logs = args.server_logs or Path(tempfile.mkdtemp(prefix="sleep-experiment-"))
        logs.mkdir(parents=True, exist_ok=True)
        pair = models(args, serve, logs)
        print(f"{experiment}, {args.arm}: the servers' own logs are in {logs}")
        settings = {"level": arm.level, "warmup": arm.warmup, "options": serve}
        record = Recorder({"experiment": experiment, "arm": args.arm, **settings, **chosen(args)})
        asyncio.run(Experiment(args, arm, record, pair).run())
    except (ExperimentFailed, CallFailed, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        print(json.dumps({"event": "failed", "reason": reason}), flush=True)
        print(f"{experiment}: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{experiment}: stopped", file=sys.stderr)
        return 1
    return 0
