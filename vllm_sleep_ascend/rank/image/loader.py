# SPDX-License-Identifier: Apache-2.0
"""vLLM's loader for ``--load-format sleep_image``.

vLLM makes the model and processes its weights once, over whatever is in their memory, so that its
layers are set up; then the image brings the content of all tensors as they were after that.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

from vllm_sleep_ascend.config import IMAGE_FORMAT, SleepModeConfig
from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.image.filling import Image, check_same
from vllm_sleep_ascend.rank.image.identity import check_start, identity_of
from vllm_sleep_ascend.rank.image.manifest import read_head


class ImageLoader(DummyModelLoader):
    """Starts a model from a saved image. A draft model comes from its checkpoint."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Give layers that are quantised while they load their parameters, with vLLM's random
        values; other layers stay without content."""
        for layer in model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                self._process_online_quant_layer(layer, info)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """
        Raises:
            ImageError: the image is not whole, or does not fit this engine.
        """
        if is_draft(vllm_config, model_config):
            draft: nn.Module = self._of_checkpoints().load_model(vllm_config, model_config, prefix)
            return draft
        check_start(vllm_config)
        directory = Path(SleepModeConfig.from_vllm_config(vllm_config).image_dir or "")
        rank = vllm_config.parallel_config.rank
        image = _open(directory, rank, vllm_config, model_config)
        untied = model_config.word_embeddings_untied_by_checkpoint
        model_config.word_embeddings_untied_by_checkpoint = False  # nothing to compare yet
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        finally:
            model_config.word_embeddings_untied_by_checkpoint = untied
        torch.accelerator.synchronize()  # other threads fill it, on streams of their own
        with torch.no_grad():
            image.fill(model)
            maybe_retie_word_embeddings(model, model_config)
        return model

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Of a checkpoint, for ``reload_weights`` with a path."""
        loader = self._of_checkpoints()
        weights: Iterator[tuple[str, torch.Tensor]]
        weights = loader.get_all_weights(model_config, model)  # type: ignore[attr-defined]
        return weights

    def _of_checkpoints(self) -> BaseModelLoader:
        return get_model_loader(replace(self.load_config, load_format="auto"))


def is_draft(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Whether that is a draft model's configuration. Speculation without a model (n-grams) has the
    model's own in that place."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return False
    draft = speculative.draft_model_config
    return model_config is draft and draft is not speculative.target_model_config


def register() -> None:
    """Make the format known to vLLM. Repeating it changes nothing."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    if IMAGE_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(IMAGE_FORMAT)(ImageLoader)


def _open(directory: Path, rank: int, vllm_config: VllmConfig, model_config: ModelConfig) -> Image:
    """The image, if every rank has its part of the same one."""
    image, failed = None, None
    try:
        _untie(model_config, directory)
        image = Image(directory, rank, identity_of(vllm_config))
    except ImageError as error:  # the others wait for what this one says
        failed = error
    group, mine = get_world_group(), None if image is None else image.id
    ids = [mine] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(ids, mine, group=group.cpu_group)
    if image is None:
        assert failed is not None
        raise failed
    if None in ids:
        raise ImageError(f"rank {ids.index(None)} cannot start from {directory}; see its log")
    check_same(ids, directory)
    return image


def _untie(model_config: ModelConfig, directory: Path) -> None:
    """A checkpoint with an output layer of its own overrules a configuration that ties it to the
    input's (``ModelConfig.maybe_untie_word_embeddings``), and here may be none to tell."""
    if not read_head(directory)["identity"].get("untied_by_checkpoint"):
        return
    for config in (model_config.hf_config, model_config.hf_config.get_text_config()):
        config.tie_word_embeddings = False
    model_config.word_embeddings_untied_by_checkpoint = True
