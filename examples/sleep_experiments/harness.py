# SPDX-License-Identifier: Apache-2.0
"""The protocol that the five experiments share: two models take turns on one device.

With sleep mode: load A, warm it up with one token, put it to sleep, the same with B; then each
round wakes A, prompts it, puts it to sleep, and does the same with B. Without: each round starts,
prompts and ends A, then B.

Every event is one JSON line between the lines for people: ``report.py`` reads those.
"""

import argparse
import asyncio
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from servers import ExperimentFailed, Model

from vllm_sleep_ascend.client import CallFailed, SleepClient

EXAMPLES = Path(__file__).resolve().parent.parent
MAKE_MODEL = EXAMPLES / "make_model.py"
MODELS = EXAMPLES.parent / "build" / "models"
PROMPTS = {"A": "The capital of France is", "B": "A short history of the steam engine:"}


class Recorder:
    """Prints events as they end: a line for people, and one of JSON."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.started = time.perf_counter()
        self._emit({"event": "experiment", **settings})

    def event(self, name: str, model: Model, seconds: float, **more: Any) -> None:
        """One event of ``seconds`` that ends now."""
        end = time.perf_counter() - self.started
        rates = f", first token {more['first_token_s']:.3f} s" if "first_token_s" in more else ""
        print(f"[{end:8.2f} s] {model.label} {name}: {seconds:.3f} s{rates}")
        times = {"seconds": round(seconds, 4), "end": round(end, 4)}
        self._emit({"event": name, "model": model.label, **times, **more})

    def done(self) -> None:
        total = time.perf_counter() - self.started
        print(f"Done in {total:.1f} s; every prompt gave the text of its model's first.")
        self._emit({"event": "done", "seconds": round(total, 4)})

    def _emit(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)


class Experiment:
    """One arm of an experiment."""

    def __init__(self, args: argparse.Namespace, record: Recorder, models: list[Model]) -> None:
        self.args = args
        self.record = record
        self.models = models

    async def run(self) -> None:
        # As Ctrl-C: the servers end with the experiment.
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await (self._with_sleep() if self.args.level else self._without_sleep())
        finally:
            for model in self.models:
                await model.stop()
        self.record.done()

    async def _with_sleep(self) -> None:
        for model in self.models:
            await self._load(model)
            await self._sleep(model, "first sleep")
        for number in range(1, self.args.rounds + 1):
            for model in self.models:
                waited = await self._wake(model, number)
                await self._prompt(model, number, waited)
                await self._sleep(model, "sleep", round=number)
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
        if self.args.warmup:
            answer = await model.complete(1)
            # From the start of the process; the look at the memory in between is not in it.
            since_start = seconds + answer.first_token_s
            more = {"first_token_s": round(since_start, 4), **await model.memory()}
            self.record.event("warm up", model, answer.seconds, **more)

    async def _sleep(self, model: Model, name: str, **more: Any) -> None:
        before = await model.memory()
        async with SleepClient(model.url) as client:
            started = time.perf_counter()
            await client.sleep(self.args.level)
            seconds = time.perf_counter() - started
            level = await client.level()
            told = await client.reports_memory()
        after = await model.memory()
        if told:
            check_level(model, self.args.level, level, before, after)
        self.record.event(name, model, seconds, level_verified=told, **more, **after)

    async def _wake(self, model: Model, number: int) -> float:
        async with SleepClient(model.url) as client:
            started = time.perf_counter()
            await client.wake_to_serve(slept_at=self.args.level)
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
        ExperimentFailed: the memory says that the server did not sleep at the wanted level.
    """
    freed = before["device_used"] - after["device_used"]
    backup_is_right = (after["weights_backup"] > 0) == (wanted == 1)
    if level != wanted or after["weights_device"] or not backup_is_right:
        raise ExperimentFailed(f"{model.name} sleeps at level {level}, not {wanted}: {after}")
    if freed < before["weights_device"]:
        raise ExperimentFailed(f"{model.name}: only {freed} bytes of the device came free")


def prepare(name: str) -> str:
    """What vLLM serves for ``name``: models of make_model.py are made if they are missing."""
    if "/" in name or Path(name).exists():
        return name
    folder = MODELS / name
    if not folder.exists():
        place = folder.relative_to(EXAMPLES.parent)
        print(f"{place} is missing: making it with {MAKE_MODEL.name}", flush=True)
    # In a process of its own: it makes weights on the host, and sets torch up for that.
    made = subprocess.run(
        [sys.executable, MAKE_MODEL, name, folder], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise ExperimentFailed(made.stderr.strip())
    return str(folder)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all experiments share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    help = "a folder, OWNER/NAME of a hub, or a model of make_model.py"
    made.add_argument("--model-a", default="tiny-qwen2", help=help)
    made.add_argument("--model-b", default="tiny-llama", help=help)
    made.add_argument("--port-a", type=int, default=8001)
    made.add_argument("--port-b", type=int, default=8002)
    made.add_argument("--tp-a", type=int, default=1, help="tensor parallel size of A")
    made.add_argument("--tp-b", type=int, default=1, help="tensor parallel size of B")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--tokens", type=int, default=100, help="of each answer")
    made.add_argument("--max-model-len", type=int, default=1024)
    made.add_argument("--max-num-batched-tokens", type=int, default=512)
    made.add_argument("--gpu-memory-utilization", type=float, default=0.75)
    made.add_argument("--options", default="", help="further options of vllm serve, for both")
    made.add_argument("--server-logs", type=Path, help="folder for the servers' own logs")
    return made


def run(
    args: argparse.Namespace,
    experiment: str,
    arm: str,
    level: int | None,
    warmup: bool = True,
    options: tuple[str, ...] = (),
) -> int:
    """Run one arm.

    Args:
        experiment: the name under which the report finds it; arm: which of its two sides.
        level: of sleep; None for servers that are started and ended each time.
        warmup: whether a freshly loaded model generates one token before it sleeps.
        options: of ``vllm serve``, for both models.
    """
    args.level, args.warmup = level, warmup
    logs = args.server_logs or Path(tempfile.mkdtemp(prefix="sleep-experiment-"))
    logs.mkdir(parents=True, exist_ok=True)
    serve = ["--max-model-len", str(args.max_model_len), "--no-enable-prefix-caching"]
    serve += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    serve += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    serve += [*options, *shlex.split(args.options)]
    if level is not None:
        serve.append("--enable-sleep-mode")
    try:
        models = [
            Model(
                label,
                prepare(name),
                port,
                [*serve, "--tensor-parallel-size", str(tp)],
                logs / f"server-{port}.log",
                PROMPTS[label],
            )
            for label, name, port, tp in (
                ("A", args.model_a, args.port_a, args.tp_a),
                ("B", args.model_b, args.port_b, args.tp_b),
            )
        ]
        print(f"{experiment}, {arm}: the servers' own logs are in {logs}")
        settings = {"experiment": experiment, "arm": arm, "level": level, "warmup": warmup}
        names = {"a": args.model_a, "b": args.model_b, "tp_a": args.tp_a, "tp_b": args.tp_b}
        sizes = {"rounds": args.rounds, "tokens": args.tokens, "options": serve}
        record = Recorder({**settings, **names, **sizes})
        asyncio.run(Experiment(args, record, models).run())
    except (ExperimentFailed, CallFailed, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        print(json.dumps({"event": "failed", "reason": reason}), flush=True)
        print(f"{experiment}: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"{experiment}: stopped", file=sys.stderr)
        return 1
    return 0
