from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robuq_bench.config import Plan, load_plan, load_workload
from robuq_bench.config.workload import ModelConfig
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_, set_activation_bits


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    """Two blocks of width 144 = 4 · 36, the Hadamard path of DiT-XL/2 in little."""
    small = {"hidden_size": 144, "depth": 2, "num_heads": 2}
    return load_workload("digits").model.model_copy(update=small)


@pytest.fixture(scope="session")
def teacher(model_config: ModelConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT.from_config(model_config)
    for block in model.blocks:  # adaLN-Zero would make every block invisible
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
        torch.nn.init.normal_(block.adaLN_modulation[1].bias, std=0.3)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def student(teacher: DiT) -> Callable[..., tuple[DiT, Plan]]:
    """Makes a quantized copy of the teacher in eval mode; `mixed` gives its layers 1 to 4 bits."""

    def make(plan: str | Plan, mixed: bool = False) -> tuple[DiT, Plan]:
        chosen = load_plan(plan) if isinstance(plan, str) else plan
        model = copy.deepcopy(teacher)
        quantize_(model, chosen)
        if mixed:
            layers = allocatable_layers(model)
            set_activation_bits(model, {name: 1 + i % 4 for i, name in enumerate(layers)})
        return model.eval(), chosen

    return make


@pytest.fixture(scope="session")
def inputs(model_config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size, channels = model_config.input_size, model_config.in_channels
    x = torch.randn(3, channels, size, size, generator=generator)
    return x, torch.tensor([3, 500, 999]), torch.tensor([0, 5, 10])
