# SPDX-License-Identifier: Apache-2.0
"""The weights of one rank: what is there of them, where it came from, and every load of them."""

import copy
import os
from collections.abc import Callable, Iterable

import torch
from vllm.logger import init_logger

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.agreement import Agreement
from vllm_sleep_ascend.rank.hooks import Hooks
from vllm_sleep_ascend.rank.host_worker import HostWorker, draft_model_config
from vllm_sleep_ascend.rank.image.filling import Image, check_same, image_of
from vllm_sleep_ascend.rank.weights.content import DRAFT, WeightsContent, models_of
from vllm_sleep_ascend.rank.weights.load import Named, Snapshot
from vllm_sleep_ascend.rank.weights.loading import SLOWEST_LOAD, Loads
from vllm_sleep_ascend.rank.weights.parameters import derive_again, own_parameters
from vllm_sleep_ascend.rank.weights.source import Sources
from vllm_sleep_ascend.status import WeightsOrigin, WeightsReport, in_no_checkpoint

logger = init_logger(f"vllm.{__name__}")


class RankWeights:
    """Made once the models are loaded, which it watches from then on.

    Args:
        stock_reload: ``reload_weights`` of vLLM's worker.
    """

    def __init__(
        self,
        worker: HostWorker,
        agreement: Agreement,
        hooks: Hooks,
        stock_reload: Callable[..., None],
    ) -> None:
        self._worker, self._agreement, self._hooks = worker, agreement, hooks
        self._stock_reload = stock_reload
        self.content = WeightsContent(worker)
        self._opened: Image | ImageError | None = None  # for the wake under way
        self._sources = Sources(worker)
        loaded_by_user = self._sources.loaded_by_user
        self._loads = Loads(worker, agreement, self.content, hooks, loaded_by_user)

    # --- What is known of them -------------------------------------------------------------------

    @property
    def updating(self) -> bool:
        """Whether a weight update is under way."""
        return bool(self._worker._weight_update_active)

    def report(self) -> WeightsReport:
        """What an engine asks before it serves."""
        return {
            "missing": self.content.missing_shards(),
            "corrupt": self.content.corrupt,
            "beyond_loading": self.content.beyond_loading,
            "updating": self.updating,
            "version": self._sources.model.version,
        }

    def origin(self) -> WeightsOrigin:
        """Where the weights came from, and a ``draft`` model, which level 2 keeps."""
        return self._sources.origin()

    @property
    def reloads_from(self) -> str:
        """The checkpoint or image that a reload loads."""
        image = self._sources.image
        return self._sources.checkpoint() if image is None else str(image.directory)

    def set_version(self, version: str) -> None:
        """Note the version that the engine was given for the weights that are there now."""
        self._sources.model.set_version(version)

    def discarded(self, names: Iterable[str]) -> None:
        """Note that these parameters have no content any more."""
        self.content.lose(names)
        self._sources.model.discarded()

    def mark_loaded(self) -> None:
        """Take the caller's word that every parameter is as it should be."""
        self.content.written()
        self._sources.model.loaded_unseen()

    # --- Reloads ---------------------------------------------------------------------------------

    def reload(
        self,
        weights_iterator: Iterable[Named] | None,
        weights_path: str | None,
        is_checkpoint_format: bool,
    ) -> None:
        """Load all weights in place, from the iterator, from the path, or from where they were
        last loaded, also an image; and those of a draft model from its checkpoint, if they were
        lost. If it fails, the weights are as before.

        Raises:
            ValueError: ``weights_path`` is a path and not a folder.
            ImageError: there is no image any more, or it does not fit any more.
            WeightsError: weights are missing; names the shards.
        """
        before, source = self.origin(), self._sources.model
        all_of_it = weights_iterator is None
        image = self._sources.image if all_of_it and weights_path is None else None

        def check() -> str | None:
            nonlocal image
            path = weights_path or ""
            if os.path.isabs(path) and not os.path.isdir(path):
                raise ValueError(f"weights_path {weights_path!r} is not a folder")
            self._hooks.check_reload()
            if image is None:
                return None
            image = image.reopened()
            return image.id

        def reload() -> None:
            weights, load = weights_iterator, self._loads.current
            assert load is not None
            if image is not None:
                self._fill(image)
                return
            if weights is not None and not is_checkpoint_format:
                weights = load.take(weights)
            with torch.no_grad():  # vLLM copies into parameters that want gradients
                self._stock_reload(
                    weights_iterator=weights,
                    weights_path=weights_path,
                    is_checkpoint_format=is_checkpoint_format,
                )
            if weights is not weights_iterator:
                load.check_parameters()
                with torch.no_grad():
                    derive_again(load.model, load.model_config.dtype)

        self._loads.begin(
            "reload_weights", "", reload, check=check, at_once=True, from_checkpoint=all_of_it
        )
        self._loads.end()
        if weights_iterator is not None:
            source.loaded("iterator")
        else:
            self._note_reload(weights_path)
        self._reload_lost_draft()  # if that fails, the model's own load stands
        lost = in_no_checkpoint(before)
        if all_of_it and weights_path is None and lost:
            logger.warning("reload_weights loaded %s in place of %s.", source.path, lost)

    def _fill(self, image: Image) -> None:
        """Load the model from an image."""
        runner, load = self._worker.model_runner, self._loads.current
        assert load is not None
        self._worker.synchronize_device()  # other threads fill it, on streams of their own
        model = runner.get_model()
        load.besides = Snapshot(image.besides(model, (p for _, p in own_parameters(model))))
        load.begun = True
        with torch.no_grad():
            image.fill(model)
        runner.reset_encoder_cache()
        runner.reset_mm_cache()

    def _note_reload(self, weights_path: str | None = None) -> None:
        """Note that all was loaded from that checkpoint, or from where it was loaded last."""
        if weights_path is not None:
            self._sources.image = None
        if self._sources.image is None:
            self._sources.model.loaded("checkpoint", self._sources.checkpoint())
            return
        self._sources.image = image_of(self._worker.model_runner.get_model())
        assert self._sources.image is not None
        self._sources.model.loaded_image(self._sources.image)

    def _reload_lost_draft(self) -> None:
        lost = bool(self.content.missing_of(DRAFT))
        if any(self._agreement.exchange(lost, SLOWEST_LOAD)):
            name = "reload_weights of the draft model"
            self._loads.begin(name, DRAFT, self._reload_draft, at_once=True, from_checkpoint=True)
            self._loads.end()

    def _reload_draft(self) -> None:
        self._hooks.check_draft_reload()
        source = self._sources.draft
        if source is None:  # the draft model is on another rank
            return
        # Not in vLLM 0.23
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.inplace import reload_weights
        from vllm.model_executor.model_loader.utils import get_draft_load_config

        config = copy.copy(self._worker.vllm_config)
        config.model_config = draft_model_config(self._worker)
        config.load_config = get_draft_load_config(self._worker.vllm_config)
        with set_current_vllm_config(config):
            draft = models_of(self._worker)[DRAFT]
            reload_weights(config, draft, None, None, is_checkpoint_format=True)
        source.loaded("checkpoint", config.model_config.model)

    def open_for_wake(self, needed: bool) -> None:
        """Together with the other ranks, before a wake: open the image, if it loads one. What is
        wrong with it, ``reload_in_wake`` raises."""
        image, self._opened = self._sources.image, None
        if image is None:
            return
        try:
            self._opened = image.reopened() if needed else None
        except ImageError as error:
            self._opened = error
        mine = self._opened.id if isinstance(self._opened, Image) else None
        ids = self._agreement.exchange(mine)
        try:
            check_same(ids, image.directory)
        except ImageError as error:
            self._opened = error

    def reload_in_wake(self) -> None:
        """Load all weights from the checkpoint or image on this rank, in the middle of a wake.

        Raises:
            SleepModeError: it cannot be loaded, or lacks a parameter.
        """
        self._loads.in_wake(
            self._stock_reload if self._sources.image is None else self._fill_opened,
            self.reloads_from,
        )
        self._note_reload()

    def _fill_opened(self) -> None:
        opened, self._opened = self._opened, None
        if isinstance(opened, ImageError):
            raise opened
        image = opened or self._sources.image
        assert image is not None
        self._fill(image)

    # --- Weight updates: each takes the method of vLLM's that does it ----------------------------

    def start_update(self, start: Callable[[], None], prefix: str = "") -> None:
        """Start an update of the model's weights, or for ``DRAFT`` the draft model's. Until it has
        finished, the engine does not serve."""
        self._loads.begin("start_weight_update", prefix, start)

    def update(self, receive: Callable[[], None]) -> None:
        """Load one part of an update. If it fails, the update is over, and the weights are as
        before it."""
        load = self._loads.current
        if load is not None:
            load.begun = True  # a backend may write past the model's load_weights
        self._loads.on_every_rank("update_weights", receive)

    def finish_update(self, finish: Callable[[], None]) -> None:
        """
        Raises:
            WeightsError: the update has brought a part of a layer; names the shards that are
                missing. The update is over, and the weights are as before it.
        """
        source = self._sources.updated()
        self._loads.on_every_rank("finish_weight_update", self._loads.check_layers, finish)
        self._loads.end()
        source.loaded("trainer")
