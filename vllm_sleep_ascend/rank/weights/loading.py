# SPDX-License-Identifier: Apache-2.0
"""How a rank loads weights again: whole, or not at all."""

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.memory.account import available_host_bytes
from vllm_sleep_ascend.rank.agreement import Agreement, Operation
from vllm_sleep_ascend.rank.weights.content import DRAFT, WeightsContent, of_model
from vllm_sleep_ascend.rank.weights.layerwise import unwrap_loaders
from vllm_sleep_ascend.rank.weights.load import Named, Snapshot, WeightLoad

logger = init_logger(f"vllm.{__name__}")

# A rank may read its weights for long; one whose process ends is noticed at once.
_SLOWEST_LOAD = timedelta(days=1)


@dataclass(frozen=True)
class _Facts:
    """What a rank says before a load: why it cannot begin, or bytes of its present weights and of
    host memory, and whether these weights are all there."""

    error: Exception | None
    needed: int = 0
    available: int = 0
    whole: bool = False


def _have_room(ranks: list[_Facts]) -> bool:
    """Whether the hosts of all ranks can keep the present weights while others are loaded.

    Raises:
        Exception: a rank cannot begin.
    """
    for rank in ranks:
        if rank.error is not None:
            raise rank.error
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


class LoadingWorker:
    """Mixin for vLLM's ``Worker``: loads that happen on every rank, or on none."""

    _content: WeightsContent
    agreement: Agreement
    _load: WeightLoad | None = None

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and watch its later loads."""
        worker: Any = super()
        worker.load_model(**kwargs)
        self.watch_weights()

    def watch_weights(self) -> None:
        self._content = WeightsContent(self._models)
        for model in self._models().values():
            self._watch(model)

    def _models(self) -> dict[str, nn.Module]:
        """The model, and a draft model, by what stands before the names of their parameters."""
        worker: Any = self
        models = {"": worker.model_runner.get_model()}
        draft = worker.get_draft_model()
        return models if draft is None else {**models, DRAFT: draft}

    def _watch(self, model: Any) -> None:
        stock = model.load_weights

        @wraps(stock)
        def load_weights(weights: Iterable[Named], *args: Any, **kwargs: Any) -> Any:
            load = self._load
            if load is None:
                unwrap_loaders(model)  # of a user's own layerwise load
                return stock(weights, *args, **kwargs)
            names = stock(load.take(weights), *args, **kwargs)
            if load.at_once:
                load.check_layers()
                load.check_all(names)
            return names

        model.load_weights = load_weights

    def shutdown(self) -> None:
        """End the worker, and let go of the layers of its models."""
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        worker: Any = self
        loaded = getattr(getattr(worker, "model_runner", None), "model", None) is not None
        models = list(self._models().values()) if loaded else []
        stock: Any = super()
        stock.shutdown()
        # vLLM remembers by layer how to load it again, and what it remembers refers to the layer.
        for model in models:
            for layer in model.modules():
                LAYERWISE_INFO.pop(layer, None)

    def weights_content(self) -> dict[str, Any]:
        """``missing``: parameters, or shards of them, without content; ``corrupt``: whether that
        was found out by comparing; ``beyond_loading``: whether more was found than loading mends;
        ``updating``: whether an update is under way."""
        worker: Any = self
        missing = self._missing()
        if missing and self._weights_are_awake():
            missing = self._content.describe(missing)
        return {
            "missing": missing,
            "corrupt": self._content.corrupt,
            "beyond_loading": self._content.beyond_loading,
            "updating": bool(worker._weight_update_active),
        }

    def mark_weights_loaded(self) -> None:
        """Take the caller's word that every parameter is as it should be."""
        self._content.written()

    # --- Loads -----------------------------------------------------------------------------------

    def reload_weights(
        self,
        weights_iterator: Iterable[Named] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Load all weights in place, from the iterator, from the path, or from where they were
        last loaded; and those of a draft model from its checkpoint, if they were lost. If it
        fails, the weights are as before.

        Raises:
            ValueError: ``weights_path`` is a path and not a folder.
            WeightsError: weights are missing; names the shards.
        """
        stock: Any = super()

        def reload() -> None:
            weights, load = weights_iterator, self._load
            assert load is not None
            if weights is not None and not is_checkpoint_format:
                weights = load.take(weights)
            with torch.no_grad():  # vLLM copies into parameters that want gradients
                stock.reload_weights(
                    weights_iterator=weights,
                    weights_path=weights_path,
                    is_checkpoint_format=is_checkpoint_format,
                )
            if weights is not weights_iterator:
                load.check_parameters()

        check = partial(self._check_reload, weights_path)
        kind = {"at_once": True, "from_checkpoint": weights_iterator is None}
        self._begin_on_every_rank("reload_weights", "", check, reload, **kind)
        self._end_load()
        lost = self._lost_of(DRAFT)
        if any(self.agreement.exchange(bool(lost), _SLOWEST_LOAD)):
            name = "reload_weights of the draft model"
            kind = {"at_once": True, "from_checkpoint": True}
            self._begin_on_every_rank(name, DRAFT, lambda: None, self._reload_draft, **kind)
            self._end_load()

    def _check_reload(self, weights_path: str | None) -> None:
        """
        Raises:
            ValueError: it is a path and not a folder.
        """
        absolute = weights_path is not None and os.path.isabs(weights_path)
        if absolute and not os.path.isdir(weights_path):  # type: ignore[arg-type]
            raise ValueError(f"weights_path {weights_path!r} is not a folder")

    def _reload_draft(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.inplace import reload_weights
        from vllm.model_executor.model_loader.utils import get_draft_load_config

        worker: Any = self
        draft = self._models()[DRAFT]
        config = copy.copy(worker.vllm_config)
        config.model_config = config.speculative_config.draft_model_config
        config.load_config = get_draft_load_config(worker.vllm_config)
        with set_current_vllm_config(config):
            reload_weights(config, draft, None, None, is_checkpoint_format=True)

    def start_weight_update(self, *args: Any, **kwargs: Any) -> None:
        """Start an update of the model's weights. Until it has finished, the engine does not
        serve."""
        stock: Any = super()
        self._start_update("", partial(stock.start_weight_update, *args, **kwargs))

    def start_draft_weight_update(self) -> None:
        """Start an update of the draft model's weights."""
        stock: Any = super()
        self._start_update(DRAFT, stock.start_draft_weight_update)

    def update_weights(self, update_info: dict | list[dict]) -> None:
        """Load one part of a weight update. If it fails, the update is over, and the weights are
        as before it."""
        stock: Any = super()
        if self._load is not None:
            self._load.begun = True  # a backend may write past the model's load_weights
        self._on_every_rank("update_weights", partial(stock.update_weights, update_info))

    def finish_weight_update(self) -> None:
        """Finish the update.

        Raises:
            WeightsError: it has brought a part of a layer; names the shards that are missing. The
                update is over, and the weights are as before it.
        """
        stock: Any = super()
        self._on_every_rank("finish_weight_update", self._check_layers, stock.finish_weight_update)
        self._end_load()

    def _end_load(self) -> None:
        if self._load is not None:
            unwrap_loaders(self._load.model)
        self._load = None

    def _start_update(self, prefix: str, start: Callable[[], None]) -> None:
        self._begin_on_every_rank("start_weight_update", prefix, lambda: None, start)

    def _check_layers(self) -> None:
        if self._load is not None:
            self._load.check_layers()

    def _begin_on_every_rank(
        self,
        name: str,
        prefix: str,
        check: Callable[[], None],
        *steps: Callable[[], None],
        **kind: bool,
    ) -> None:
        """Begin a load and take its steps, if the ``check`` of every rank lets it."""
        facts, keeps = partial(self._facts_of_load, prefix, check), False

        def judge(ranks: list[_Facts]) -> None:
            nonlocal keeps
            keeps = _have_room(ranks)

        def begin() -> None:
            model, config = self._models().get(prefix), getattr(self, "model_config")  # noqa: B009
            if model is None:  # it is on another rank
                return
            if prefix == DRAFT:
                worker: Any = self
                config = worker.vllm_config.speculative_config.draft_model_config
            snapshot = Snapshot(model) if keeps else None
            whole = not self._lost_of(prefix)
            self._load = WeightLoad(self._content, prefix, model, config, whole, snapshot, **kind)

        self._on_every_rank(name, begin, *steps, facts=facts, judge=judge)

    def _facts_of_load(self, prefix: str, check: Callable[[], None]) -> "_Facts":
        worker: Any = self
        try:
            check()
            if worker._weight_update_active:
                raise SleepModeError(
                    "a weight update is under way; call finish_weight_update first"
                )
        except Exception as error:
            return _Facts(error)
        model = self._models().get(prefix)
        needed = sum(p.nbytes for p in model.parameters()) if model is not None else 0
        return _Facts(None, needed, available_host_bytes(), not self._lost_of(prefix))

    def _lost_of(self, prefix: str) -> list[str]:
        return [name for name in self._missing() if of_model(name, prefix)]

    def _on_every_rank(
        self,
        name: str,
        *steps: Callable[[], None],
        facts: Callable[[], Any] = lambda: None,
        judge: Callable[[list[Any]], None] = lambda _: None,
    ) -> None:
        """Load on every rank, or have every rank as it was."""
        take_back = self._way_back()
        if self.agreement.size == 1:
            judge([facts()])
            try:
                for step in steps:
                    step()
            except BaseException:
                take_back()
                raise
            return
        operation = Operation(
            name,
            steps,
            commit=lambda: None,
            abort=take_back,
            facts=facts,
            judge=judge,
            timeout=_SLOWEST_LOAD,
        )
        try:
            self.agreement.carry_out(operation)
        except Exception as error:
            write_type(error)
            raise

    def _way_back(self) -> Callable[[], str]:
        """What ends the load and has the model, and where it is loaded from, as they are now."""
        worker: Any = self
        config = worker.model_config
        names = ("model", "model_weights", "revision")
        source = {name: getattr(config, name) for name in names if hasattr(config, name)}

        def take_back() -> str:
            for name, value in source.items():
                setattr(config, name, value)
            if self._load is None:
                return ""
            self._load.take_back()
            self._load = None
            worker._weight_update_active = False
            engine: Any = getattr(worker, "weight_transfer_engine", None)
            if hasattr(engine, "reset_weight_update_target"):
                engine.reset_weight_update_target()
            return ""

        return take_back

    # --- What is known of the content ------------------------------------------------------------

    def _missing(self) -> list[str]:
        return self._content.missing(self._weights_are_awake())

    def _weights_are_awake(self) -> bool:
        worker: Any = self
        enabled = worker.model_config.enable_sleep_mode
        return not enabled or not worker.sleep_mode_backend.asleep("weights")

    def _reload_all(self) -> None:
        """Load all weights from the checkpoint on this rank, in the middle of a wake.

        Raises:
            SleepModeError: the checkpoint cannot be loaded, or lacks a parameter.
        """
        worker: Any = self
        stock: Any = super()
        config = worker.model_config
        take_back = self._way_back()
        kind = {"at_once": True, "from_checkpoint": True, "in_wake": True}
        self._load = WeightLoad(
            self._content, "", self._models()[""], config, was_whole=False, snapshot=None, **kind
        )
        try:
            stock.reload_weights()
        except Exception as error:
            take_back()
            path = config.model
            raise SleepModeError(f"the weights cannot be loaded from {path}: {error}") from error
        self._end_load()
