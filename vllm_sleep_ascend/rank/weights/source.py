# SPDX-License-Identifier: Apache-2.0
"""Where weights came from. A checkpoint or an image can bring back what level 2 discards, a trainer
has to send it again."""

from typing import Literal

from vllm_sleep_ascend.rank.host_worker import HostWorker, draft_model_config
from vllm_sleep_ascend.rank.image.filling import Image, image_of
from vllm_sleep_ascend.status import WeightsOrigin

Kind = Literal[
    "checkpoint",
    "image",  # saved by an engine, with whatever weights it had
    "trainer",  # a weight update, by whichever backend
    "iterator",  # of reload_weights
    "load_weights",  # of the model, called by a user's code
    "mark_weights_loaded",  # a load that nobody saw
    "dummy",  # vLLM's load format of random weights
]

FIRST_VERSION = "default"
"""vLLM's version of weights to which nobody gave one."""


class WeightsSource:
    """Of one model: ``kind`` and ``path`` (None unless a checkpoint or an image) of the last load
    that succeeded, and the version that its weights have."""

    def __init__(self, kind: Kind, path: str | None) -> None:
        self.kind, self.path = kind, path
        self._first = path
        self._given: str | None = None
        self._discarded = False

    @property
    def version(self) -> str:
        """As it was given to these weights; else the path of a checkpoint that is not the first."""
        if self._given is not None:
            return self._given
        another = self.path is not None and self.path != self._first
        return str(self.path) if another else FIRST_VERSION

    def set_version(self, version: str) -> None:
        """Note the version of the weights that are there now."""
        self._given = version

    def loaded_image(self, image: Image) -> None:
        """Note a load of an image. Its weights have the version with which they were saved."""
        self.loaded("image", str(image.directory))
        version = image.origin["version"]
        self._given = None if version == FIRST_VERSION else version

    def discarded(self) -> None:
        """Note that the content is gone."""
        self._discarded = True

    def loaded(self, kind: Kind, path: str | None = None) -> None:
        """Note a load. The version that was given belongs to the source that the weights had."""
        if (kind, path) != (self.kind, self.path):
            self._given = None
        self.kind, self.path = kind, path
        self._discarded = False

    def loaded_unseen(self) -> None:
        """Note a load that was not watched; it may have completed one that was."""
        if self._discarded or self.kind in ("checkpoint", "dummy"):
            self.loaded("mark_weights_loaded")


class Sources:
    """Of a rank's model, and of its draft model, if there is one on this rank."""

    def __init__(self, worker: HostWorker) -> None:
        self._worker = worker
        # That from which a reload loads, until a checkpoint is named
        self.image = image_of(worker.model_runner.get_model())
        self.model = self._source_of(self.checkpoint())
        if self.image is not None:
            self.model = WeightsSource("image", str(self.image.directory))
            self.model.loaded_image(self.image)
        self.draft: WeightsSource | None = None
        if worker.get_draft_model() is not None:
            self.draft = self._source_of(draft_model_config(worker).model)

    def checkpoint(self) -> str:
        """Where a reload of the model loads from, unless that is an image."""
        config = self._worker.model_config
        return getattr(config, "model_weights", "") or config.model

    def updated(self) -> WeightsSource:
        """Of the model that a weight update is for."""
        is_draft = getattr(self._worker, "_weight_update_is_draft", False)  # not in vLLM 0.23
        return self.draft if is_draft and self.draft else self.model

    def loaded_by_user(self, is_draft: bool) -> None:
        """Note a load of one of them, whose ``load_weights`` a user's code has called."""
        source = self.draft if is_draft and self.draft else self.model
        source.loaded("load_weights")

    def origin(self) -> WeightsOrigin:
        """Of both, for the status."""
        origin: WeightsOrigin = {
            "source": self.model.kind,
            "path": self.model.path,
            "version": self.model.version,
        }
        if self.draft is not None:
            origin["draft"] = {"source": self.draft.kind, "path": self.draft.path}
        return origin

    def _source_of(self, path: str) -> WeightsSource:
        if self._worker.load_config.load_format == "dummy":
            return WeightsSource("dummy", None)
        return WeightsSource("checkpoint", path)
