# SPDX-License-Identifier: Apache-2.0
"""Device memory, host memory and the link's speed over time during a sleep and a wake.

A thread samples them while a model with a KV cache sleeps at level 1, wakes its weights and then
its KV cache. Host memory is prepared first, as by an engine that is ready to serve.

    python benchmarks/timeline.py --device cuda --out build/results
    python benchmarks/timeline.py --draw build/results/timeline_cuda_qwen2.5-7b.json
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import build, report
from bench.options import add_options, fill_in_options


class Recorder:
    """Samples device memory, host memory and the bytes copied in a phase."""

    def __init__(self, machine: Any, camem: Any, context: int, every_s: float) -> None:
        self._machine, self._camem, self._context = machine, camem, context
        self._every_s = every_s
        self._start = time.perf_counter()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._samples: list[dict[str, float]] = []
        self.phases: list[dict[str, Any]] = []

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    @contextmanager
    def phase(self, name: str, copies_to: str | None = None) -> Iterator[None]:
        first = self._sample()
        yield
        last = self._sample()
        phase = {"name": name, "copies_to": copies_to, "start_s": first["s"], "end_s": last["s"]}
        self.phases.append(phase)

    def samples(self) -> dict[str, list[float]]:
        """The samples of each figure, without those equal to both neighbours."""
        ordered = sorted(self._samples, key=lambda sample: sample["s"])
        for phase in self.phases:
            within = [at for at in ordered if phase["start_s"] <= at["s"] <= phase["end_s"]]
            # Until the next operation has begun, the counter is that of the previous one.
            count, before = phase["copies_to"] is not None, within[0]["copied"]
            for sample in within[:-1] if count else within:
                if count and sample["copied"] != before:
                    break
                sample["copied"] = 0
        ends = {phase[end] for phase in self.phases for end in ("start_s", "end_s")}
        figures = [tuple(sample.values())[1:] for sample in ordered]
        kept = [
            sample
            for number, sample in enumerate(ordered)
            if sample["s"] in ends or len(set(figures[max(0, number - 1) : number + 2])) > 1
        ]
        return {figure: [sample[figure] for sample in kept] for figure in ordered[0]}

    def _run(self) -> None:
        self._machine.torch.set_device(0)  # of this thread
        while not self._ends.wait(self._every_s):
            self._sample()

    def _sample(self) -> dict[str, float]:
        free, total = self._machine.torch.mem_get_info()
        sample = {
            "s": round(time.perf_counter() - self._start, 6),
            "device": total - free - self._context,
            "host": self._camem.pinned_host_bytes() + self._camem.plain_host_bytes(),
            "copied": self._camem.copied_bytes(),
        }
        self._samples.append(sample)
        return sample


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from bench import allocators
    from bench.machine import Machine
    from bench.models import MODELS
    from bench.tensors import Weights, kv_cache

    machine = Machine(options.device)
    peak = machine.link_peak(options.link_mib << 20)
    ours: Any = allocators.make("ours", machine, options.chunk_mib)
    machine.warm_up()
    ours.sleep()  # of nothing, so that what the allocator loads counts as context
    context = machine.used()
    weights = Weights(MODELS[options.model], ours, machine)
    cache = kv_cache(options.kv_blocks, options.kv_block_mib, ours, machine)
    machine.used()  # frees torch's cache
    ours.prepare()
    with Recorder(machine, ours.camem, context, options.every_s) as recorder:
        with recorder.phase("awake"):
            time.sleep(options.pause_s)
        with recorder.phase("sleep", "host"):
            ours.sleep()
        with recorder.phase("asleep"):
            time.sleep(options.pause_s)
        with recorder.phase("wake weights", "device"):
            ours.wake(["weights"])
        with recorder.phase("weights awake"):
            time.sleep(options.pause_s)
        with recorder.phase("wake KV cache"):
            ours.wake(["kv_cache"])
        with recorder.phase("awake again"):
            time.sleep(options.pause_s)
    cache[0].fill_(1)
    return {
        "machine": Machine.describe_host(options.device),
        "device": options.device,
        "model": options.model,
        "weights_bytes": sum(weight.nbytes for weight in weights.tensors),
        "kv_bytes": sum(block.nbytes for block in cache),
        "chunk_mib": options.chunk_mib,
        "every_s": options.every_s,
        "link_peak_gb_s": peak,
        "context_bytes": context,
        "contents_kept": weights.kept(),
        "phases": recorder.phases,
        "samples": recorder.samples(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--pause-s", type=float, default=None, help="pause between operations")
    parser.add_argument("--every-s", type=float, default=0.002, help="time between samples")
    parser.add_argument("--draw", type=Path, help="only draw this JSON again")
    options = parser.parse_args()
    toy = fill_in_options(options)
    options.pause_s = options.pause_s or (0.05 if toy else 0.5)
    return options


def main() -> None:
    options = parse()
    if options.draw is not None:
        report.draw_timeline(options.draw.with_suffix(".png"), json.loads(options.draw.read_text()))
        return
    if options.device == "cuda":
        build.build()
        os.environ.setdefault("NPU_SIM_HBM_GIB", str(build.device_gib() - 3))
    result = measure(options)
    report.print_table(report.timeline_rows(result))
    if options.out is not None:
        path = options.out / f"timeline_{options.device}_{options.model}.json"
        report.write_json(path, result)
        report.draw_timeline(path.with_suffix(".png"), result)
    if not result["contents_kept"]:
        raise SystemExit("contents were lost")


if __name__ == "__main__":
    main()
