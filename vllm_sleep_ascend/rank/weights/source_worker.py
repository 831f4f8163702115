# SPDX-License-Identifier: Apache-2.0
"""A rank that knows where its weights came from, and what a reload would put in their place."""

from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger

from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.policy import DEFERRABLE_TAGS
from vllm_sleep_ascend.rank.weights.loading import LoadingWorker, Named
from vllm_sleep_ascend.rank.weights.source import WeightsSource
from vllm_sleep_ascend.status import WeightsOrigin, in_no_checkpoint

logger = init_logger(f"vllm.{__name__}")


class SourceWorker(LoadingWorker):
    """Mixin for vLLM's ``Worker``: every load notes its source."""

    _source: WeightsSource
    _draft_source: WeightsSource | None = None

    def watch_weights(self) -> None:
        super().watch_weights()
        worker: Any = self

        def source_of(model: Any, path: str) -> WeightsSource:
            if worker.load_config.load_format == "dummy":
                return WeightsSource(model, "dummy", None)
            return WeightsSource(model, "checkpoint", path)

        self._source = source_of(worker.model_runner.get_model(), self._checkpoint())
        draft = worker.get_draft_model()
        if draft is not None:
            path = worker.speculative_config.draft_model_config.model
            self._draft_source = source_of(draft, path)

    def weights_status(self) -> WeightsOrigin:
        """Where the weights came from, and a ``draft`` model, which level 2 keeps."""
        source, draft = self._source, self._draft_source
        status: WeightsOrigin = {
            "source": source.kind,
            "path": source.path,
            "version": source.version,
        }
        if draft is not None:
            status["draft"] = {"source": draft.kind, "path": draft.path}
        return status

    def weights_content(self) -> dict[str, Any]:
        """As ``LoadingWorker``'s, with the ``version``."""
        return {**super().weights_content(), "version": self._source.version}

    def give_weight_version(self, version: str) -> None:
        """Note the version that the engine was given for the weights that are there now."""
        self._source.give_version(version)

    def mark_weights_loaded(self) -> None:
        super().mark_weights_loaded()
        self._source.loaded_unseen()

    def reload_weights(
        self,
        weights_iterator: Iterable[Named] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        before = self.weights_status()
        with self._source.loading():
            super().reload_weights(weights_iterator, weights_path, is_checkpoint_format)
        if weights_iterator is not None:
            self._source.loaded("iterator")
            return
        path = self._checkpoint()
        self._source.loaded("checkpoint", path)
        if weights_path is None and before["source"] != "checkpoint":
            logger.warning(
                "reload_weights loaded %s in place of %s.", path, in_no_checkpoint(before)
            )

    def update_weights(self, update_info: dict | list[dict]) -> None:
        with self._updated_source().loading():
            super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        source = self._updated_source()
        super().finish_weight_update()
        source.loaded("trainer")

    def _updated_source(self) -> WeightsSource:
        is_draft = getattr(self, "_weight_update_is_draft", False)  # not in vLLM 0.23
        return self._draft_source if is_draft and self._draft_source else self._source

    def _reload_all(self) -> None:
        with self._source.loading():
            super()._reload_all()
        self._source.loaded("checkpoint", self._checkpoint())

    def _reload_draft(self) -> None:
        worker: Any = self
        source = self._draft_source
        if source is None:  # the draft model is on another rank
            return
        with source.loading():
            super()._reload_draft()
        source.loaded("checkpoint", worker.speculative_config.draft_model_config.model)

    def _refuse_another_source(self, tags: list[str] | None) -> None:
        """In a wake that reloads what was discarded. One of the weights alone is the way to load
        them by other means, and reloads nothing.

        Raises:
            SleepModeError: a checkpoint would be served in place of weights that came from
                elsewhere.
        """
        worker: Any = self
        weights_alone = tags is not None and {*tags}.intersection(DEFERRABLE_TAGS) == {"weights"}
        lost = in_no_checkpoint(self.weights_status())
        if lost is None or weights_alone or worker._weight_update_active:
            return
        if tags is None or "weights" in tags or not worker.sleep_mode_backend.asleep("weights"):
            raise SleepModeError(
                f"wake refused: {lost} are lost, and after_level2='reload' would serve "
                f"{worker.model_config.model} in their place. Wake the tag weights alone, load "
                "them again by a weight update, or a checkpoint by "
                "collective_rpc('reload_weights'), and then wake the rest. Nothing has changed"
            )

    def _checkpoint(self) -> str:
        """Where a reload loads from."""
        worker: Any = self
        config = worker.model_config
        return getattr(config, "model_weights", "") or config.model
