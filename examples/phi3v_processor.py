# SPDX-License-Identifier: Apache-2.0
"""The processor of `tiny-phi3v`, which `make_model.py` puts into the model's folder.

Neither Transformers nor vLLM ships one for Phi-3-vision: published checkpoints bring it along, and
load with `--trust-remote-code` only. This one has what vLLM asks of it. An image is cut into tiles
of 336 by 336 pixels, and is seen once more as a whole.
"""

import math
import re
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin

TILE = 336
IMAGE_TOKEN = 32044  # vLLM's; no text has it
_MEAN, _DEVIATION = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # CLIP's
_WHITE = (255, 255, 255)


class Phi3VProcessor(ProcessorMixin):
    def __init__(
        self, tokenizer: Any, num_crops: int = 2, chat_template: str | None = None, **_: Any
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.num_crops = num_crops
        self.img_tokens = [f"<|image_{number}|>" for number in range(1, 1001)]

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """A tile has 12 rows of 12 tokens. Each row of the image ends with a separator, and one
        more is between the tiles and the whole, which is one tile."""
        rows, columns = self._tiles(width, height)
        return (rows * columns + 1) * 144 + (rows + 1) * 12 + 1

    def _tiles(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns: as many along the longer side as the limit allows."""
        if width < height:
            columns, rows = self._tiles(height, width)
            return rows, columns
        across = 1
        while (across + 1) * math.ceil((across + 1) * height / width) <= self.num_crops:
            across += 1
        return math.ceil(across * height / width), across

    def _pixels(self, image: Image.Image) -> tuple[torch.Tensor, list[int]]:
        rows, columns = self._tiles(*image.size)
        size = columns * TILE, rows * TILE
        padded = ImageOps.pad(image.convert("RGB"), size, Image.Resampling.BICUBIC, _WHITE)
        whole = padded.resize((TILE, TILE), Image.Resampling.BICUBIC)
        tiles = _normal(padded).reshape(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4)
        pixels = torch.zeros(self.num_crops + 1, 3, TILE, TILE)
        pixels[0] = _normal(whole)
        pixels[1 : rows * columns + 1] = tiles.reshape(-1, 3, TILE, TILE)
        return pixels, [rows * TILE, columns * TILE]

    def __call__(
        self, text: str | list[str], images: list[Image.Image] | None = None, **_: Any
    ) -> BatchFeature:
        (text,) = text if isinstance(text, list) else [text]
        ids: list[int] = []
        for part in re.split(r"(<\|image_\d+\|>)", text):
            if part in self.img_tokens:
                width, height = (images or [])[self.img_tokens.index(part)].size
                count = self.calc_num_image_tokens_from_image_size(width, height)
                ids += [IMAGE_TOKEN] * count
            else:
                ids += self.tokenizer(part).input_ids
        found = {"input_ids": torch.tensor([ids])}
        if images:
            pixels, sizes = zip(*map(self._pixels, images), strict=True)
            found |= {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}
        return BatchFeature(found)


def _normal(image: Image.Image) -> torch.Tensor:
    colours = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy((colours - _MEAN) / _DEVIATION).float().permute(2, 0, 1)
