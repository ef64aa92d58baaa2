"""A small DiT's sizes."""

from __future__ import annotations

import pytest

from robuq_bench.config import ModelConfig, load_workload

WIDTH, DEPTH, TOKENS = 48, 2, 16


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    changes = {"hidden_size": WIDTH, "depth": DEPTH, "num_heads": 2}
    fields = {**load_workload("digits").model.model_dump(), **changes}
    config = ModelConfig.model_validate(fields)
    assert (config.input_size // config.patch_size) ** 2 == TOKENS
    return config
