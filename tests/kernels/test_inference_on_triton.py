"""A whole DiT on the Triton kernels against the same arithmetic in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch

from robuq_bench.config import load_plan, load_workload
from robuq_bench.inference import prepare_for_inference
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_, set_activation_bits


@pytest.mark.parametrize(("fuse", "dtype"), [(True, torch.float32), (False, torch.float32),
                                             (True, torch.bfloat16)])  # fmt: skip
@torch.inference_mode()
def test_a_dit_on_triton(device: torch.device, fuse: bool, dtype: torch.dtype) -> None:
    small = {"hidden_size": 48, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = DiT.from_config(load_workload("digits").model.model_copy(update=small))
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    quantize_(model, load_plan("a4"))
    layers = allocatable_layers(model)
    set_activation_bits(model, {name: (8, 4, 2, 3)[i % 4] for i, name in enumerate(layers)})
    model.to(device)
    x = torch.randn(2, 1, 8, 8, device=device)
    t, y = torch.tensor([7, 900], device=device), torch.tensor([0, 10], device=device)
    integer = prepare_for_inference(copy.deepcopy(model), "integer")(x, t, y)
    triton = prepare_for_inference(model, "triton", dtype, fuse=fuse)(x.to(dtype), t, y)
    assert triton.dtype == dtype
    error = float((triton.float() - integer).norm() / integer.norm())
    assert error < (0.02 if dtype == torch.float32 else 0.06)
