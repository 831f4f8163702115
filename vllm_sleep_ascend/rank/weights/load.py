# SPDX-License-Identifier: Apache-2.0
"""A running load of a model's weights, and its rollback."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from vllm_sleep_ascend.errors import WeightsError
from vllm_sleep_ascend.rank.weights import layerwise
from vllm_sleep_ascend.rank.weights.content import WeightsContent
from vllm_sleep_ascend.rank.weights.shards import plain

if TYPE_CHECKING:
    from vllm.config import ModelConfig

Named = tuple[str, torch.Tensor]

_NAMED = 8


class Loadable(Protocol):
    """A vLLM model. Its method returns the names that it has loaded, if it tells."""

    load_weights: Callable[..., set[str] | None]


class Snapshot:
    """A copy of tensors on the host, while a load replaces them."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._content = [(tensor.data, tensor.data.to("cpu", copy=True)) for tensor in tensors]

    @property
    def bytes(self) -> int:
        """Of host memory."""
        return sum(content.nbytes for _, content in self._content)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy them back into their original memory."""
        for tensor, content in self._content:
            tensor.copy_(content)


@dataclass
class WeightLoad:
    """A load into ``model``, whose parameters' names start with ``prefix`` in ``content``.

    ``snapshot`` exists if the model had all of its content and the host has enough memory.
    ``at_once``: a call loads whole layers; ``from_checkpoint``: and all of them. ``in_wake``: if
    the load fails, the weights sleep again. ``begun``: the model has been changed. ``besides``:
    what else than parameters the load replaces.
    """

    content: WeightsContent
    prefix: str
    model: nn.Module
    model_config: "ModelConfig"
    was_whole: bool
    snapshot: Snapshot | None
    at_once: bool = False
    from_checkpoint: bool = False
    in_wake: bool = False
    begun: bool = False
    besides: Snapshot | None = None
    _lacking: bool = field(default=False, init=False)
    _taken: set[str] = field(default_factory=set, init=False)

    def take(self, weights: Iterable[Named]) -> Iterator[Named]:
        """Pass the weights on.

        Raises:
            WeightsError: a weight occurs twice. vLLM counts elements, and would not notice that
                another one is missing.
        """
        for name, tensor in weights:
            self.begun = True
            if name in self._taken:
                raise WeightsError(f"the load brings {name} twice{self._aftermath()}")
            self._taken.add(name)
            yield name, tensor

    def check_layers(self) -> None:
        """
        Raises:
            WeightsError: a layer was loaded in part; names the shards that are missing.
        """
        self._check(layerwise.missing_shards(self.model))

    def check_parameters(self) -> None:
        """After a load whose names are those of the model's parameters.

        Raises:
            WeightsError: it has loaded only some of a layer's parameters; names the others.
        """
        taken = {plain(name) for name in self._taken}
        missing: list[str] = []
        for path, layer in self.model.named_modules():
            own = {plain(f"{path}.{name}") for name, _ in layer.named_parameters(recurse=False)}
            if own & taken:
                missing += sorted(own - taken)
        self._check(missing)

    def check_all(self, loaded: Iterable[str] | None) -> None:
        """``loaded``: the names that the model's ``load_weights`` returns, or None.

        Raises:
            WeightsError: a checkpoint lacks parameters; names them.
        """
        if loaded is None or not self.from_checkpoint or self.model_config.quantization:
            return
        names = self.content.parameters_of(self.prefix)
        self._check(sorted({plain(n) for n in names} - set(loaded)))

    def roll_back(self) -> None:
        """Roll the model back. If that is not possible, its weights count as lost."""
        layerwise.call_off(self.model, self.model_config)
        if self.besides is not None:
            self.besides.restore()
        if self.snapshot is not None:
            self.snapshot.restore()
        elif self.begun and (self.was_whole or not self._lacking):
            self.content.spoil(self.prefix)

    def _check(self, missing: list[str]) -> None:
        if not missing:
            return
        self._lacking = True
        names = ", ".join(self.prefix + name for name in missing[:_NAMED])
        if len(missing) > _NAMED:
            names += f" and {len(missing) - _NAMED} more"
        raise WeightsError(f"the load has no weights for {names}{self._aftermath()}")

    def _aftermath(self) -> str:
        if self.in_wake:
            return ""
        if self.snapshot is not None:
            return "; the weights are those before it. Load them again, whole"
        return "; the engine serves once all weights have been loaded"
