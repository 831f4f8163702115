# SPDX-License-Identifier: Apache-2.0
"""Weight shapes of real models as in vLLM: fused projections, bf16."""

import math
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Model:
    """A dense decoder; sizes are in elements."""

    layers: int
    hidden: int
    kv: int
    intermediate: int
    vocabulary: int

    def shapes(self) -> list[tuple[int, ...]]:
        h, kv, inter = self.hidden, self.kv, self.intermediate
        embedding = (self.vocabulary, h)
        layer = [(h + 2 * kv, h), (h, h), (2 * inter, h), (h, inter), (h,), (h,), (h + 2 * kv,)]
        return [embedding, *(layer * self.layers), (h,), embedding]

    def bytes(self) -> int:
        return 2 * sum(math.prod(shape) for shape in self.shapes())


MODELS = {
    "qwen2.5-7b": Model(28, 3584, 512, 18944, 152064),
    "qwen2.5-14b": Model(48, 5120, 1024, 13824, 152064),
    "toy": Model(2, 512, 128, 1408, 8192),
}
