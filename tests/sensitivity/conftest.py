"""A tiny quantized DiT, its teacher, and calibration sets for them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from robuq_bench.config import Plan, load_plan
from robuq_bench.diffusion import Diffusion
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import allocatable_layers, quantize_
from robuq_bench.sensitivity import calibration_set
from robuq_bench.training import Batch


class Subject(NamedTuple):
    model: nn.Module
    teacher: nn.Module
    layers: list[str]
    batches: list[Batch]
    diffusion: Diffusion


def plan_without_attention_bits() -> Plan:
    plan = load_plan("a4")
    attention = plan.attention.model_copy(update={"matmul_bits": None})
    return plan.model_copy(update={"attention": attention})


def tiny_subject(seed: int = 0) -> Subject:
    torch.manual_seed(seed)
    teacher = DiT(
        input_size=4,
        in_channels=1,
        hidden_size=48,
        depth=1,
        num_heads=2,
        num_classes=3,
        learn_sigma=False,
    )
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.2)
    teacher.requires_grad_(False).eval()
    model = copy.deepcopy(teacher).requires_grad_(True)
    plan = plan_without_attention_bits()
    quantize_(model, plan)
    diffusion = Diffusion()
    images = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    batches = calibration_set(images, torch.arange(20) % 3, diffusion, 16, 6, 7)
    return Subject(model, teacher, allocatable_layers(model), batches, diffusion)


@pytest.fixture
def subject() -> Subject:
    return tiny_subject()
