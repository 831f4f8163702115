# SPDX-License-Identifier: Apache-2.0
"""What a rank knows of the content of its weights: which parameters were loaded since level 2."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from vllm_sleep_ascend.errors import SleepModeError

logger = init_logger(f"vllm.{__name__}")

Named = tuple[str, torch.Tensor]


class WeightsContent:
    """The parameters of a model whose content was discarded and not loaded since.

    Every load through the model's ``load_weights`` is seen, whoever calls it.
    """

    def __init__(self, model: nn.Module, quantized: bool) -> None:
        self._model = model
        self._quantized = quantized
        self._consumed = 0
        self.missing: set[str] = set()
        self._found_corrupt = False
        self.beyond_loading = False
        loader: Any = model
        loader.load_weights = self._watched(loader.load_weights)

    def lose(self, but: Iterable[str] = ()) -> None:
        """Note that all content is gone, of these parameters excepted."""
        self._found_corrupt = False
        self.missing = {_plain(name) for name, _ in self._model.named_parameters()}
        self.missing -= {_plain(name) for name in but}

    def found_corrupt(self, beyond_loading: bool) -> None:
        """Note that the content is not what it should be, and whether a load can mend that."""
        self.lose()
        self._found_corrupt = True
        self.beyond_loading = self.beyond_loading or beyond_loading

    @property
    def corrupt(self) -> bool:
        """Whether content that was found to be wrong has not all been loaded since."""
        return self.beyond_loading or (self._found_corrupt and bool(self.missing))

    def knowledge(self) -> tuple[set[str], bool]:
        """What is known now, for ``know``."""
        return set(self.missing), self._found_corrupt

    def know(self, knowledge: tuple[set[str], bool]) -> None:
        """What was known then holds again: the memory is as it was then."""
        self.missing, self._found_corrupt = set(knowledge[0]), knowledge[1]

    def loaded(self, names: Iterable[str] | None) -> None:
        """Note that these parameters were loaded; None means all."""
        if names is None:
            self.missing.clear()
            return
        names = {_plain(name) for name in names}
        if self._quantized:
            # Parameters are made anew from what was loaded, under other names of the same module.
            modules = {_module(name) for name in names}
            self.missing = {name for name in self.missing if _module(name) not in modules}
        self.missing -= names

    def whole_or_torn(self, load: Callable[[], Any]) -> Any:
        """Run a load. If it fails after it took weights, none can be relied on any more."""
        before = self._consumed
        try:
            return load()
        except BaseException:
            if self._consumed > before:
                self.lose()
            raise

    def counted(self, weights: Iterable[Named]) -> Iterator[Named]:
        """The same weights; what is taken of them counts as written."""
        for item in weights:
            self._consumed += 1
            yield item

    def _watched(self, stock: Callable) -> Callable:
        @wraps(stock)
        def load_weights(weights: Iterable[Named], *args: Any, **kwargs: Any) -> Any:
            names = stock(self.counted(weights), *args, **kwargs)
            self.loaded(names)
            return names

        return load_weights


class LoadingWorker:
    """Mixin for vLLM's ``Worker``: loads that are whole or known to be torn."""

    _content: WeightsContent

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and watch its later loads."""
        worker: Any = super()
        worker.load_model(**kwargs)
        self.watch_weights()

    def watch_weights(self) -> None:
        worker: Any = self
        model = worker.model_runner.get_model()
        self._content = WeightsContent(model, worker.model_config.quantization is not None)

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
        """``missing``: parameters without content; ``corrupt``: whether that was found out by
        comparing; ``beyond_loading``: whether more was found than loading mends; ``updating``:
        whether an update is under way."""
        worker: Any = self
        return {
            "missing": sorted(self._content.missing),
            "corrupt": self._content.corrupt,
            "beyond_loading": self._content.beyond_loading,
            "updating": bool(worker._weight_update_active),
        }

    def mark_weights_loaded(self) -> None:
        """Take the caller's word that every parameter was loaded, by a way that is not watched."""
        self._content.loaded(None)

    def reload_weights(
        self,
        weights_iterator: Iterable[Named] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Load all weights in place, from the iterator, from the path, or from where they were
        last loaded.

        Raises:
            ValueError: ``weights_path`` is a path and not a folder.
        """
        absolute = weights_path is not None and os.path.isabs(weights_path)
        if absolute and not os.path.isdir(weights_path):  # type: ignore[arg-type]
            raise ValueError(f"weights_path {weights_path!r} is not a folder")
        stock: Any = super()
        names: set[str] = set()
        if weights_iterator is not None and not is_checkpoint_format:
            weights_iterator = self._content.counted(_noted(weights_iterator, names))
        self._load(
            lambda: stock.reload_weights(
                weights_iterator=weights_iterator,
                weights_path=weights_path,
                is_checkpoint_format=is_checkpoint_format,
            )
        )
        self._content.loaded(names)

    def update_weights(self, update_info: dict | list[dict]) -> None:
        """Load one part of a weight update. If it fails, the update is over."""
        stock: Any = super()
        try:
            self._load(lambda: stock.update_weights(update_info))
        except BaseException:
            worker: Any = self
            worker._weight_update_active = False  # vLLM 0.23 leaves it open
            raise

    def _load(self, load: Callable[[], None]) -> None:
        """Run a load; if it fails, the model is usable again, and its source is the one before."""
        worker: Any = self
        config = worker.model_config
        names = ("model", "model_weights", "revision")
        source = {name: getattr(config, name) for name in names if hasattr(config, name)}
        try:
            self._content.whole_or_torn(load)
        except BaseException:
            for name, value in source.items():
                setattr(config, name, value)
            _end_layerwise_reload(worker.model_runner.get_model(), config)
            raise

    def _reload_all(self) -> None:
        """
        Raises:
            SleepModeError: the checkpoint cannot be loaded, or lacks a parameter.
        """
        worker: Any = self
        path = worker.model_config.model
        try:
            self.reload_weights()
        except Exception as error:
            raise SleepModeError(f"the weights cannot be loaded from {path}: {error}") from error
        missing = sorted(self._content.missing)
        if missing:
            raise SleepModeError(
                f"{path} has no weights for {', '.join(missing[:8])}"
                + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            )


def _end_layerwise_reload(model: nn.Module, model_config: Any) -> None:
    """A reload moves parameters aside and puts them back at its end, which a failure skips."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    if any(get_layerwise_info(layer).can_load() for layer in model.modules()):
        finalize_layerwise_reload(model, model_config)


def _noted(weights: Iterable[Named], names: set[str]) -> Iterator[Named]:
    for name, tensor in weights:
        yield name, tensor
        names.add(name)


def _plain(name: str) -> str:
    """A parameter's name without what LoRA puts around its layer."""
    return name.replace(".base_layer.", ".")


def _module(name: str) -> str:
    return name.rpartition(".")[0]
