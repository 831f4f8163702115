# SPDX-License-Identifier: Apache-2.0
"""How a rank loads weights again: whole, or not at all."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from typing import Any, cast

from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory.host import available_host_bytes
from vllm_sleep_ascend.rank.agreement import Agreement, Operation
from vllm_sleep_ascend.rank.hooks import Hooks
from vllm_sleep_ascend.rank.host_worker import HostWorker, draft_model_config
from vllm_sleep_ascend.rank.image.filling import check_same
from vllm_sleep_ascend.rank.weights.content import DRAFT, WeightsContent, models_of
from vllm_sleep_ascend.rank.weights.layerwise import unwrap_loaders
from vllm_sleep_ascend.rank.weights.load import Loadable, Named, Snapshot, WeightLoad

logger = init_logger(f"vllm.{__name__}")

# A rank may read its weights for long; one whose process ends is noticed at once.
SLOWEST_LOAD = timedelta(days=1)


@dataclass(frozen=True)
class _Facts:
    """What a rank says before a load: why it cannot begin, or bytes of its present weights and of
    host memory, and whether these weights are all there and can be kept; and which image it loads,
    if any."""

    error: Exception | None
    needed: int = 0
    available: int = 0
    whole: bool = False
    image: str | None = None


def _have_room(ranks: list[_Facts]) -> bool:
    """Whether the hosts of all ranks can keep the present weights while others are loaded.

    Raises:
        Exception: a rank cannot begin.
    """
    for rank in ranks:
        if rank.error is not None:
            raise rank.error
    check_same((rank.image for rank in ranks), "image_dir")
    if not all(rank.whole for rank in ranks):
        return False
    room, needed = min(rank.available for rank in ranks), sum(rank.needed for rank in ranks)
    if needed > room:
        logger.warning(
            "The present weights take %d bytes, and the host has %d left: they are not kept while "
            "others are loaded. If the load fails, the engine serves once all weights have been "
            "loaded.",
            *(needed, room),
        )
    return needed <= room


class Loads:
    """Loads of a rank's models, one at a time, each on every rank of the engine or on none.

    ``current`` is the one under way; ``loaded_by_user`` is told of the models that a user's code
    has loaded without one, and whether they are the draft.
    """

    def __init__(
        self,
        worker: HostWorker,
        agreement: Agreement,
        content: WeightsContent,
        hooks: Hooks,
        loaded_by_user: Callable[[bool], None],
    ) -> None:
        self._worker, self._agreement = worker, agreement
        self._content, self._hooks = content, hooks
        self._loaded_by_user = loaded_by_user
        self.current: WeightLoad | None = None
        for prefix, model in models_of(worker).items():
            self._watch(model, is_draft=prefix == DRAFT)

    def _watch(self, model: nn.Module, is_draft: bool) -> None:
        loadable = cast(Loadable, model)
        stock = loadable.load_weights
        shared = self._shared_with_target(model) if is_draft else frozenset()

        def without_shared(weights: Iterable[Named]) -> Iterator[Named]:
            return ((name, weight) for name, weight in weights if _end(name) not in shared)

        @wraps(stock)
        def load_weights(
            weights: Iterable[Named], *args: object, **kwargs: object
        ) -> set[str] | None:
            load = self.current
            if load is None:
                unwrap_loaders(model)  # of a user's own layerwise load
                names = stock(without_shared(weights), *args, **kwargs)
                self._loaded_by_user(is_draft)
                return names
            names = stock(without_shared(load.take(weights)), *args, **kwargs)
            if load.at_once:
                load.check_layers()
                load.check_all(names)
            return names

        loadable.load_weights = load_weights

    def _shared_with_target(self, draft: nn.Module) -> frozenset[str]:
        """The ends of the names of a draft's parameters that are the target's too, such as the
        embedding of an EAGLE head. No load of the draft may write them: the target's tokens would
        be wrong. Checkpoints and models agree on the ends of names alone."""
        targets = {id(parameter) for parameter in models_of(self._worker)[""].parameters()}
        named = draft.named_parameters(remove_duplicate=False)
        return frozenset(_end(name) for name, parameter in named if id(parameter) in targets)

    def begin(
        self,
        name: str,
        prefix: str,
        *steps: Callable[[], None],
        check: Callable[[], str | None] = lambda: None,
        at_once: bool = False,
        from_checkpoint: bool = False,
    ) -> None:
        """Begin a load and take its steps, if the ``check`` of every rank lets it, and names the
        same image, if any; the rest as in ``WeightLoad``."""
        worker, keeps = self._worker, False

        def judge(ranks: list[_Facts]) -> None:
            nonlocal keeps
            keeps = _have_room(ranks)

        def begin() -> None:
            model = models_of(worker).get(prefix)
            if model is None:  # it is on another rank
                return
            config = draft_model_config(worker) if prefix == DRAFT else worker.model_config
            own = self._content.parameters_of(prefix).values()
            snapshot = Snapshot(own) if keeps else None
            whole = not self._content.missing_of(prefix)
            self.current = WeightLoad(
                *(self._content, prefix, model, config, whole, snapshot),
                at_once=at_once,
                from_checkpoint=from_checkpoint,
            )

        facts = partial(self._facts, prefix, check)
        self.on_every_rank(name, begin, *steps, facts=facts, judge=judge)

    def _facts(self, prefix: str, check: Callable[[], str | None]) -> _Facts:
        try:
            image = check()
            if self._worker._weight_update_active:
                raise SleepModeError(
                    "a weight update is under way; call finish_weight_update first"
                )
        except Exception as error:
            return _Facts(error)
        needed = sum(p.nbytes for p in self._content.parameters_of(prefix).values())
        whole = not self._content.missing_of(prefix) and self._hooks.can_copy_back()
        return _Facts(None, needed, available_host_bytes(), whole, image)

    def on_every_rank(
        self,
        name: str,
        *steps: Callable[[], None],
        facts: Callable[[], object] = lambda: None,
        judge: Callable[[list[Any]], None] = lambda _: None,
    ) -> None:
        """Load on every rank, or have every rank as it was."""
        roll_back = self._rollback()
        if self._agreement.size == 1:
            judge([facts()])
            try:
                for step in steps:
                    step()
            except BaseException:
                roll_back()
                raise
            return
        operation = Operation(
            name,
            steps,
            commit=lambda: None,
            abort=roll_back,
            facts=facts,
            judge=judge,
            timeout=SLOWEST_LOAD,
        )
        try:
            self._agreement.carry_out(operation)
        except Exception as error:
            write_type(error)
            raise

    def in_wake(self, load: Callable[[], None], path: str) -> None:
        """Load all weights from the checkpoint or image at ``path`` on this rank, in the middle of
        a wake.

        Raises:
            SleepModeError: it cannot be loaded, or lacks a parameter.
        """
        worker, roll_back = self._worker, self._rollback()
        model, config = models_of(worker)[""], worker.model_config
        self.current = WeightLoad(
            *(self._content, "", model, config),
            was_whole=False,
            snapshot=None,
            at_once=True,
            from_checkpoint=True,
            in_wake=True,
        )
        try:
            load()
        except Exception as error:
            roll_back()
            raise SleepModeError(f"the weights cannot be loaded from {path}: {error}") from error
        self.end()

    def check_layers(self) -> None:
        """
        Raises:
            WeightsError: a layer was loaded in part; names the shards that are missing.
        """
        if self.current is not None:
            self.current.check_layers()

    def end(self) -> None:
        """Note that the load is complete."""
        if self.current is not None:
            unwrap_loaders(self.current.model)
        self.current = None

    def _rollback(self) -> Callable[[], str]:
        """What ends the load and has the model, and where it is loaded from, as they are now."""
        worker = self._worker
        config = worker.model_config
        names = ("model", "model_weights", "revision")
        source = {name: getattr(config, name) for name in names if hasattr(config, name)}

        def roll_back() -> str:
            for name, value in source.items():
                setattr(config, name, value)
            # A rank on which the load went well has dropped them, and encoding is collective.
            drop_images = getattr(worker.model_runner, "drop_images", None)  # of our own runner
            if drop_images is not None:
                drop_images()
            if self.current is None:
                return ""
            self.current.roll_back()
            self.current = None
            worker._weight_update_active = False
            engine = worker.weight_transfer_engine
            if engine and hasattr(engine, "reset_weight_update_target"):  # not in vLLM 0.23
                engine.reset_weight_update_target()
            return ""

        return roll_back


def _end(name: str) -> str:
    """A parameter's name with that of its layer."""
    return ".".join(name.split(".")[-2:])
