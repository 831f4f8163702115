# SPDX-License-Identifier: Apache-2.0
"""Tracks which parameters have lost their content since level 2."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from vllm_sleep_ascend.rank.host_worker import HostWorker
from vllm_sleep_ascend.rank.weights.parameters import own_parameters
from vllm_sleep_ascend.rank.weights.shards import shards_of
from vllm_sleep_ascend.rank.weights.unwritten import mark, unwritten, unwritten_at_start

DRAFT = "draft."
"""The prefix of the names of a draft model's parameters."""

_NAMED = 8  # parameters whose shards are named


@dataclass(frozen=True)
class ContentSnapshot:
    """What is known at one time, for a rollback."""

    lost: frozenset[str] = field(default_factory=frozenset)
    corrupt: bool = False


class WeightsContent:
    """The parameters whose content was lost, and which of them have been written since.

    ``mark`` writes marks into their memory once it is awake. A parameter without a mark has been
    written, by any code, and is not checked again.
    """

    def __init__(self, worker: HostWorker) -> None:
        self._worker = worker
        self._lost: set[str] = set()
        self._found_corrupt = False
        self.beyond_loading = False

    def parameters(self) -> dict[str, torch.Tensor]:
        """All current parameters, without views of others; one that several models share occurs
        once."""
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for prefix, model in models_of(self._worker).items():
            for name, parameter in own_parameters(model):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[prefix + name] = parameter
        return found

    def parameters_of(self, prefix: str) -> dict[str, torch.Tensor]:
        """One model's parameters, by their names in it. What a draft model shares belongs to the
        target."""
        found = self.parameters().items()
        return {name.removeprefix(prefix): p for name, p in found if of_model(name, prefix)}

    def lose(self, names: Iterable[str]) -> None:
        """These parameters have lost their content."""
        self._lost |= set(names)

    def mark(self) -> None:
        """Overwrite lost parameters with marks. Their memory must be awake."""
        parameters = self.parameters()
        for name in self._lost & parameters.keys():
            mark(parameters[name])

    def spoil(self, prefix: str = "") -> None:
        """Treat all parameters of a model as lost, because their content is not reliable."""
        self.lose(name for name in self.parameters() if of_model(name, prefix))
        self.mark()

    def found_corrupt(self, names: Iterable[str], beyond_loading: bool) -> None:
        """These parameters have wrong content; also whether loading them repairs everything. Their
        memory is awake."""
        self.lose(names)
        self.mark()
        self._found_corrupt = True
        self.beyond_loading = self.beyond_loading or beyond_loading

    def written(self) -> None:
        """Every parameter has been written, as the caller asserts."""
        self._lost.clear()

    def missing(self) -> list[str]:
        """The names of parameters that were lost and have not been completely written since.
        Sleeping memory can neither be written nor checked."""
        if self._lost and self._awake():
            self._look()
        return sorted(self._lost)

    def missing_of(self, prefix: str) -> list[str]:
        """The same for one model."""
        return [name for name in self.missing() if of_model(name, prefix)]

    def missing_shards(self) -> list[str]:
        """The same for all models. For the first parameters it names the missing shards, if some
        shards are present."""
        names = self.missing()
        if not names or not self._awake():
            return names
        parameters = self.parameters()
        if _are_aside(parameters):
            return names
        told: list[str] = []
        for name in names[:_NAMED]:
            shards = self._shards(name, parameters[name])
            flags = unwritten(shards.values())
            told += [name] if all(flags) else _those(shards, flags)
        return told + names[_NAMED:]

    @property
    def corrupt(self) -> bool:
        """Whether content that was found to be wrong has not been completely written since."""
        return self.beyond_loading or (self._found_corrupt and bool(self._lost))

    def snapshot(self) -> ContentSnapshot:
        """What is known now, for ``restore``."""
        return ContentSnapshot(frozenset(self._lost), self._found_corrupt)

    def restore(self, snapshot: ContentSnapshot) -> None:
        """Restore what was known then, because the memory is as it was then."""
        self._lost, self._found_corrupt = set(snapshot.lost), snapshot.corrupt

    def _look(self) -> None:
        """Drop parameters that have been written. Only those written at their start are read
        completely, so that checks after many small loads read every parameter about once."""
        parameters = self.parameters()
        if _are_aside(parameters):
            return
        lost = [name for name in self._lost if name in parameters]
        begun = _those(lost, map(_not, unwritten_at_start(parameters[name] for name in lost)))
        whole = _those(begun, map(_not, unwritten(parameters[name] for name in begun)))
        self._lost = set(lost) - set(whole)

    def _shards(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        models = models_of(self._worker)
        prefix = DRAFT if name.startswith(DRAFT) and DRAFT in models else ""
        shards = shards_of(models[prefix], name.removeprefix(prefix), parameter)
        return {prefix + shard: content for shard, content in shards.items()}

    def _awake(self) -> bool:
        enabled = self._worker.model_config.enable_sleep_mode
        return not enabled or not self._worker.sleep_mode_backend.asleep("weights")


def models_of(worker: HostWorker) -> dict[str, nn.Module]:
    """A rank's model and its draft model, by the prefix of their parameters' names."""
    models = {"": worker.model_runner.get_model()}
    draft = worker.get_draft_model()
    return models if draft is None else {**models, DRAFT: draft}


def _are_aside(parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether an update is running, during which a model has other parameters, without memory."""
    return any(parameter.is_meta for parameter in parameters.values())


def of_model(name: str, prefix: str) -> bool:
    """Whether a parameter is the draft model's, for ``DRAFT``, or the model's own, for ""."""
    return name.startswith(DRAFT) == (prefix == DRAFT)


def _those(names: Iterable[str], flags: Iterable[bool]) -> list[str]:
    return [name for name, flag in zip(names, flags, strict=True) if flag]


def _not(flag: bool) -> bool:
    return not flag
