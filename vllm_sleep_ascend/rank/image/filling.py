# SPDX-License-Identifier: Apache-2.0
"""Fills a model from a saved image, and knows which models were."""

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.image import identity, manifest, pieces, tensors
from vllm_sleep_ascend.status import WeightsOrigin

# A child of vLLM's logger, so that its handlers and level apply where it is.
logger = logging.getLogger(f"vllm.{__name__}")

_NAMED = 4


class Image:
    """A rank's part of the image in a directory, which fits the engine with this identity.

    Raises:
        ImageError: there is no whole image, or it does not fit.
    """

    def __init__(self, directory: Path, rank: int, engine: Mapping[str, Any]) -> None:
        self.directory, self.identity = directory, engine
        self._number = rank
        head = manifest.read_head(directory)
        self.id = head["id"]
        identity.check(directory, head["identity"], engine)
        self._rank = manifest.read_rank(directory, head, rank)

    @property
    def origin(self) -> WeightsOrigin:
        """Where the weights came from that were saved."""
        return self._rank["weights"]

    def reopened(self) -> "Image":
        """What the directory has now.

        Raises:
            ImageError: as at first.
        """
        return Image(self.directory, self._number, self.identity)

    def fill(self, model: nn.Module) -> None:
        """Give the model's tensors their content, after vLLM has processed whatever was there. The
        device has no work.

        Raises:
            ImageError: its tensors are others than those of the image, or the file is not what was
                written. In the first case nothing was filled.
        """
        entries = self._rank["tensors"]
        at_start = model not in _filled
        if at_start:
            _take_strides(model, entries)
        own = tensors.registered(model)
        here = {**tensors.attached(model), **own}
        # Later ones are not made by a load, such as the KV cache
        made = _on_devices_of(own, here) if at_start else own
        problems = [
            *_named("the engine has no", (name for name in entries if name not in here)),
            *_named("the image has no", (name for name in made if name not in entries)),
            *_named(
                "the kind of tensor differs, in the image and here:",
                (
                    f"{name} ({entry['kind']} and {here[name].kind})"
                    for name, entry in entries.items()
                    if name in here and entry["kind"] != here[name].kind
                ),
            ),
            *_named(
                "the bytes differ, in the image and here:",
                (
                    f"{name} ({entry['bytes']} and {here[name].bytes})"
                    for name, entry in entries.items()
                    if name in here
                    and entry["kind"] == here[name].kind
                    and entry["bytes"] != here[name].bytes
                ),
            ),
        ]
        if problems:
            raise ImageError(
                f"{self.directory} does not fit the model of rank {self._number}: "
                f"{'; '.join(problems)}. Start with the options of the engine that saved it, or "
                "save the image again"
            )
        offsets = {name: entry["offset"] for name, entry in entries.items()}
        spans = tensors.placed({name: here[name] for name in entries}, offsets)
        path, size = self.directory / manifest.weights_name(self._number), self._rank["bytes"]
        started = time.perf_counter()
        pieces.read(path, spans, size, self._rank["sha256"])
        seconds = time.perf_counter() - started
        logger.info("Filled the model with %d bytes of %s in %.3f s", size, path, seconds)
        _filled[model] = self

    def besides(self, model: nn.Module, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The memory, as bytes, that ``fill`` writes besides those parameters."""
        # Between the elements of one that is not dense may be others
        dense = ((tensors.held(parameter), parameter.nbytes) for parameter in parameters)
        covered = [whole for whole, size in dense if whole.bytes == size]
        here = {**tensors.attached(model), **tensors.registered(model)}
        others = {name: here[name] for name in self._rank["tensors"] if name in here}
        return tensors.not_within(others, covered)


def _take_strides(model: nn.Module, entries: Mapping[str, manifest.Entry]) -> None:
    """Give parameters the strides that they have in the image.

    Processing may leave a parameter that is a part of something larger, and an engine with sleep
    mode then copies it into memory of its own (``native.quantization.compact``). One that shares
    memory with another one stays as it is, and so is refused.
    """
    of_name = dict(model.named_parameters(remove_duplicate=False))
    held = tensors.registered(model)
    shared: set[str] = set()
    for names in tensors.by_memory(held):
        # Two that are not dense may lie between each other's elements
        dense = any(n not in of_name or held[n].bytes == of_name[n].nbytes for n in names)
        if dense and len({id(of_name.get(name)) for name in names}) > 1:
            shared.update(names)
    for name, parameter in of_name.items():
        entry = entries.get(name)
        if entry is None or parameter.is_meta or name in shared:
            continue
        kind = tensors.kind(parameter, entry["stride"])
        if kind == entry["kind"] and list(parameter.stride()) != entry["stride"]:
            parameter.data = torch.empty_strided(
                parameter.shape, entry["stride"], dtype=parameter.dtype, device=parameter.device
            )


def _on_devices_of(own: Mapping[str, tensors.Held], here: Mapping[str, tensors.Held]) -> list[str]:
    devices = {tensor.device for tensor in own.values()}
    return [name for name, tensor in here.items() if name in own or tensor.device in devices]


def check_same(ids: Iterable[str | None], directory: str | Path) -> None:
    """
    Args:
        ids: of the image that each rank has; None for a rank that loads none.

    Raises:
        ImageError: the ranks have parts of several images.
    """
    found = sorted({one for one in ids if one is not None})
    if len(found) > 1:
        raise ImageError(
            f"{directory} has parts of several images on the hosts of the engine "
            f"({', '.join(found)}); copy the directory of one save to each host, or save again"
        )


_filled: "WeakKeyDictionary[nn.Module, Image]" = WeakKeyDictionary()


def image_of(model: nn.Module) -> Image | None:
    """The image that a model was filled from last, if it was."""
    return _filled.get(model)


def _named(what: str, names: Iterable[str]) -> list[str]:
    those = list(names)
    if not those:
        return []
    more = f" and {len(those) - _NAMED} more" if len(those) > _NAMED else ""
    return [f"{what} {', '.join(those[:_NAMED])}{more}"]
