# SPDX-License-Identifier: Apache-2.0
"""EAGLE heads and MTP on two ranks and with weights in 8 bits: the same before and after sleep."""

import pytest
from helpers.drafts import KINDS, SOME, TOKENS, answer, options_of
from helpers.engine import engine, sleep_and_wake
from helpers.models import make_model
from helpers.reference import hf_greedy


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{"tensor_parallel_size": 2}, {"quantization": "fp8", "dtype": "bfloat16"}],
    ids=["two ranks", "8 bits"],
)
def test_other_engines(kind, options):
    with engine(
        make_model(KINDS[kind][0]), enable_sleep_mode=True, **options_of(kind), **options
    ) as llm:
        first = answer(llm)
        assert first[2] > 0
        for level in (1, 2):
            sleep_and_wake(llm, level)
            assert answer(llm) == first, f"after level {level}"
        if "quantization" not in options:
            assert first[0] == hf_greedy(make_model(KINDS[kind][0]), SOME, TOKENS)
