# SPDX-License-Identifier: Apache-2.0
"""Random cycles of sleep and wake with new weights, pauses and faults: no token is ever wrong.

Meanwhile another process allocates what a sleep frees, and a server starts, sleeps and wakes on the
same device. ``RANDOM_CYCLES_SEED`` chooses other cycles.
"""

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from helpers.engine import draft_counts, driver_worker, engine, few, send_update
from helpers.faults import DRIVER_ERROR
from helpers.neighbours import Neighbour
from helpers.reference import hf_few
from helpers.server import SMALL, Server
from safetensors.torch import load_file

from vllm_sleep_ascend.errors import SleepModeError, WeightsError
from vllm_sleep_ascend.sim import control

FAULTY = ("aclrtMallocPhysical", "aclrtMapMem", "aclrtUnmapMem", "aclrtMemcpyAsync")
NEIGHBOUR_MIB = 128


class NextDoor:
    """A server on the same device. Its operations run in parallel with the test's."""

    def __init__(self, model: Path, folder: Path, stack: ExitStack) -> None:
        self._command = (model, "--enable-sleep-mode", "--dtype", "float32", *SMALL)
        self._log, self._stack = folder / "server", stack
        self._beside = stack.enter_context(ThreadPoolExecutor(1))
        self._server: Server | None = None
        self._slept_at, self._paused = 0, False

    def move(self, level: int, pause: bool):
        return self._beside.submit(self._move, level, pause)

    def _move(self, level: int, pause: bool) -> str:
        """Start, and then in turns: sleep at this level, perhaps after a pause; wake and give the
        same answers as before."""
        if self._server is None:
            env = {"VLLM_SERVER_DEV_MODE": "1"}
            options = ("--gpu-memory-utilization", "0.3")
            server = Server(*self._command, *options, log=self._log, env=env)
            self._server = self._stack.enter_context(server)
            self._text = server.complete()
            return "server started"
        if not self._slept_at:
            if pause:
                self._server.post("/pause", params={"mode": "keep"})
            self._server.post("/sleep", params={"level": level})
            self._slept_at, self._paused = level, pause
            return "server paused and slept" if pause else "server slept"
        self._server.post("/wake_up", params={"tags": "weights"})
        if self._slept_at == 2:
            self._server.post("/collective_rpc", json={"method": "reload_weights"})
        self._server.post("/wake_up")
        self._server.post("/reset_prefix_cache")
        assert self._server.http.get("/is_paused").json()["is_paused"] == self._paused
        if self._paused:
            self._server.post("/resume")
        assert self._server.complete() == self._text
        self._slept_at = 0
        return "server woke"


class Cycles:
    """An engine, two checkpoints, which of them is loaded, and the draft model, if any."""

    def __init__(
        self, llm, models: list[Path], folder: Path, seed: int, next_door: NextDoor, drafts: bool
    ) -> None:
        self.llm, self.models, self.folder = llm, models, folder
        self.chance = random.Random(seed)
        self.weights = [load_file(model / "model.safetensors") for model in models]
        self.tokens = [hf_few(model) for model in models]
        self.present = 0
        self.draft = 0 if drafts else None
        self.done: Counter = Counter()
        self.neighbour, self.next_door = Neighbour(), next_door
        model = driver_worker(llm).model_runner.get_model()
        self.content = []
        for model_path in models:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model_path)})
            self.content.append({name: p.cpu() for name, p in model.named_parameters()})
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(models[0])})

    def check(self) -> None:
        self.llm.reset_prefix_cache()
        if self.draft is None:
            assert few(self.llm) == self.tokens[self.present], self.done
            return
        before = draft_counts(self.llm)
        assert few(self.llm) == self.tokens[self.present], self.done
        drafted, taken = (a - b for a, b in zip(draft_counts(self.llm), before, strict=True))
        assert (taken > drafted / 2) == (self.draft == self.present), self.done

    def cycle(self) -> None:
        beside = self.next_door.move(self.chance.choice((1, 2)), self.chance.random() < 0.5)
        self.engine_cycle()
        self.done[beside.result()] += 1

    def engine_cycle(self) -> None:
        level = self.chance.choice((0, 1, 2, 2))
        self.done[f"level {level}"] += 1
        if self.chance.random() < 0.3:
            self.llm.sleep(level=0)
            self.done["paused"] += 1
        if level:
            self.surely(lambda: self.llm.sleep(level=level))
            with pytest.raises(SleepModeError):
                few(self.llm)
            self.neighbour.hold(NEIGHBOUR_MIB)  # what the engine has freed
            self.neighbour.hold(0)
            first = ["weights"] if level == 2 else self.chance.choice((None, ["weights"]))
            self.surely(lambda: self.llm.wake_up(tags=first))
        if level == 2 or self.chance.random() < 0.5:
            self.load(is_there=level != 2)
        self.surely(self.llm.wake_up)
        self.check()

    def surely(self, operation) -> None:
        """Do it. Sometimes a call of the device fails first, and the operation is retried."""
        if self.chance.random() < 0.4:
            rule = f"{self.chance.choice(FAULTY)}:{self.chance.randint(1, 3)}:{DRIVER_ERROR}"
            control.set_faults(rule)
            with suppress(SleepModeError):
                operation()
                control.set_faults("")
                return
            control.set_faults("")
            self.done["fault"] += 1
        operation()

    def load(self, is_there: bool) -> None:
        """Load one of the checkpoints in any of the ways; some attempts fail first."""
        for _ in range(self.chance.choice((0, 0, 1, 2))):
            self.fail_to_load()
            if is_there and self.chance.random() < 0.5:
                return
        wanted = self.chance.randrange(2)
        way = self.chance.choice((self.from_file, self.by_update, self.by_writing, self.by_loader))
        self.done[way.__name__] += 1
        way(wanted)
        self.present = wanted
        if self.draft is not None and self.chance.random() < 0.5:
            self.load_draft()

    def load_draft(self) -> None:
        wanted = self.chance.randrange(2)
        weights = self.weights[wanted]
        if self.chance.random() < 0.5:
            missing = self.chance.choice([name for name in weights if "v_proj" in name])
            lacking = {name: weight for name, weight in weights.items() if name != missing}
            with pytest.raises(WeightsError, match=f"no weights for draft.{missing}"):
                send_update(self.llm, lacking, self.folder, draft=True)
            self.done["partial draft"] += 1
        else:
            send_update(self.llm, weights, self.folder, draft=True)
            self.draft = wanted
            self.done["draft"] += 1

    def fail_to_load(self) -> None:
        """A failed load keeps loaded weights; without loaded weights nothing is served."""
        other = self.weights[1 - self.present]
        missing = self.chance.choice(
            [name for name in other if "k_proj" in name or "up_proj" in name]
        )
        lacking = {name: weight for name, weight in other.items() if name != missing}
        with pytest.raises(WeightsError, match=missing):
            if self.chance.random() < 0.5:
                send_update(self.llm, lacking, self.folder)
            else:
                weights = iter(lacking.items())
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.done["partial"] += 1

    def from_file(self, wanted: int) -> None:
        path = str(self.models[wanted])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    def by_update(self, wanted: int) -> None:
        send_update(self.llm, self.weights[wanted], self.folder)

    def by_loader(self, wanted: int) -> None:
        weights = self.weights[wanted]
        self.llm.collective_rpc(
            lambda worker: worker.model_runner.model.load_weights(weights.items())
        )

    def by_writing(self, wanted: int) -> None:
        content = self.content[wanted]

        def write(worker):
            for name, parameter in worker.model_runner.model.named_parameters():
                parameter.data.copy_(content[name])

        self.llm.collective_rpc(write)


@pytest.mark.parametrize("drafts", [False, True], ids=["alone", "with a draft model"])
@pytest.mark.parametrize(
    "cycles", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
def test_no_token_is_wrong_in_random_cycles(tiny_model, other_model, tmp_path, cycles, drafts):
    from vllm.config import WeightTransferConfig

    draft = {"model": str(tiny_model), "num_speculative_tokens": 3, "method": "draft_model"}
    options = {"speculative_config": draft, "disable_log_stats": False} if drafts else {}
    with (
        engine(
            tiny_model,
            enable_sleep_mode=True,
            weight_transfer_config=WeightTransferConfig(backend="safetensors"),
            **options,
        ) as llm,
        ExitStack() as stack,
    ):
        llm.init_weight_transfer_engine({"init_info": {}})
        next_door = NextDoor(tiny_model, tmp_path, stack)
        seed = int(os.environ.get("RANDOM_CYCLES_SEED", cycles))
        run = Cycles(llm, [tiny_model, other_model], tmp_path, seed, next_door, drafts)
        stack.callback(run.neighbour.end)
        stack.callback(control.set_faults, "")
        for cycle in range(cycles):
            print(f"RANDOM_CYCLES_SEED={seed}, cycle {cycle}")  # shown if it fails
            run.cycle()
        kinds = {"level 0", "level 1", "level 2", "paused", "fault", "partial"}
        ways = {"from_file", "by_update", "by_writing", "by_loader"}
        moves = {"server started", "server slept", "server paused and slept", "server woke"}
        of_draft = {"draft", "partial draft"} if drafts else set()
        assert run.done.keys() == kinds | ways | moves | of_draft
