# SPDX-License-Identifier: Apache-2.0
"""How a rank loads weights again: whole, or not at all."""

import copy
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial, wraps
from typing import Any

from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.agreement import Agreement, Operation
from vllm_sleep_ascend.content import DRAFT, WeightsContent
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.host_memory import available_bytes
from vllm_sleep_ascend.weight_load import Named, Snapshot, WeightLoad

logger = init_logger(f"vllm.{__name__}")

# A rank may read its weights for long; one whose process ends is noticed at once.
_SLOWEST_LOAD = timedelta(days=1)


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
            loader: Any = model
            loader.load_weights = self._watched(loader.load_weights)

    def _models(self) -> dict[str, nn.Module]:
        """The model, and a draft model, by what stands before the names of their parameters."""
        worker: Any = self
        models = {"": worker.model_runner.get_model()}
        draft = worker.get_draft_model()
        return models if draft is None else {**models, DRAFT: draft}

    def _watched(self, stock: Callable) -> Callable:
        @wraps(stock)
        def load_weights(weights: Iterable[Named], *args: Any, **kwargs: Any) -> Any:
            load = self._load
            if load is None:
                return stock(weights, *args, **kwargs)
            names = stock(load.take(weights), *args, **kwargs)
            if load.at_once:
                load.check_layers()
                load.check_all(names)
            return names

        return load_weights

    def shutdown(self) -> None:
        """End the worker, and let go of the model's layers."""
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        worker: Any = self
        model = getattr(getattr(worker, "model_runner", None), "model", None)
        stock: Any = super()
        stock.shutdown()
        # vLLM remembers by layer how to load it again, and what it remembers refers to the layer.
        for layer in model.modules() if model is not None else ():
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
        absolute = weights_path is not None and os.path.isabs(weights_path)
        if absolute and not os.path.isdir(weights_path):  # type: ignore[arg-type]
            raise ValueError(f"weights_path {weights_path!r} is not a folder")
        stock: Any = super()
        load = self._begin_load("", at_once=True, from_checkpoint=weights_iterator is None)
        if weights_iterator is not None and not is_checkpoint_format:
            weights_iterator = load.take(weights_iterator)
        reload = partial(
            stock.reload_weights,
            weights_iterator=weights_iterator,
            weights_path=weights_path,
            is_checkpoint_format=is_checkpoint_format,
        )
        self._on_every_rank("reload_weights", reload)
        self._load = None
        if any(name.startswith(DRAFT) for name in self._missing()):
            self._begin_load(DRAFT, at_once=True, from_checkpoint=True)
            self._on_every_rank("reload_weights of the draft model", self._reload_draft)
            self._load = None

    def _reload_draft(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.inplace import reload_weights
        from vllm.model_executor.model_loader.utils import get_draft_load_config

        worker: Any = self
        config = copy.copy(worker.vllm_config)
        config.model_config = config.speculative_config.draft_model_config
        config.load_config = get_draft_load_config(worker.vllm_config)
        with set_current_vllm_config(config):
            reload_weights(config, self._models()[DRAFT], None, None, is_checkpoint_format=True)

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
        self._on_every_rank("update_weights", partial(stock.update_weights, update_info))

    def finish_weight_update(self) -> None:
        """Finish the update.

        Raises:
            WeightsError: it has brought a part of a layer; names the shards that are missing. The
                update is over, and the weights are as before it.
        """
        stock: Any = super()
        self._on_every_rank("finish_weight_update", self._check_layers, stock.finish_weight_update)
        self._load = None

    def _start_update(self, prefix: str, start: Callable[[], None]) -> None:
        worker: Any = self
        if worker._weight_update_active:
            start()  # which refuses
        self._begin_load(prefix)
        self._on_every_rank("start_weight_update", start)

    def _check_layers(self) -> None:
        if self._load is not None:
            self._load.check_layers()

    def _begin_load(self, prefix: str, **kind: bool) -> WeightLoad:
        worker: Any = self
        model, config = self._models()[prefix], worker.model_config
        if prefix == DRAFT:
            config = worker.vllm_config.speculative_config.draft_model_config
        whole = not any(name.startswith(DRAFT) == (prefix == DRAFT) for name in self._missing())
        snapshot = Snapshot(model) if self._has_room(model, whole) else None
        self._load = WeightLoad(self._content, prefix, model, config, whole, snapshot, **kind)
        return self._load

    def _has_room(self, model: nn.Module, whole: bool) -> bool:
        """Whether the hosts of all ranks can hold the present weights, which are all there."""
        needed = sum(parameter.nbytes for parameter in model.parameters())
        ranks = self.agreement.exchange((needed, available_bytes(), whole), _SLOWEST_LOAD)
        if not all(whole for _, _, whole in ranks):
            return False
        room = min(available for _, available, _ in ranks)
        needed = sum(needed for needed, _, _ in ranks)
        if needed > room:
            logger.warning(
                "The present weights take %d bytes, and the host has %d left: they are not kept "
                "while others are loaded. If the load fails, the engine serves once all weights "
                "have been loaded.",
                needed,
                room,
            )
        return needed <= room

    def _on_every_rank(self, name: str, *steps: Callable[[], None]) -> None:
        """Load on every rank, or have every rank as it was."""
        take_back = self._way_back()
        if self.agreement.size > 1:
            operation = Operation(
                name, steps, commit=lambda: None, abort=take_back, timeout=_SLOWEST_LOAD
            )
            self.agreement.carry_out(operation)
            return
        try:
            for step in steps:
                step()
        except BaseException:
            take_back()
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
            if self._load is not None:
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
        self._load = None
