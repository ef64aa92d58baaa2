"""The models that `study efficiency` times on a CPU, with random weights and open gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels import build
from robuq_bench.accounting.account import with_branch_rank
from robuq_bench.config import load_plan, load_workload
from robuq_bench.errors import MissingResourceError
from robuq_bench.inference import prepare_for_inference
from robuq_bench.inference.random_weights import pack_random_
from robuq_bench.measuring.int8_peer import dynamic_int8
from robuq_bench.models.dit import SIZES, Blocks, DiT

PAPER_WORKLOAD = "imagenet256"
NOISE = 2**20  # values that are drawn; weights repeat them


@dataclass(frozen=True)
class CpuVariant:
    """How a model runs on a CPU. `plan` is that of a packed model, "" for full precision."""

    name: str
    label: str
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    peer: bool = False
    plan: str = ""


_BF16 = torch.bfloat16
CPU_VARIANTS = {
    variant.name: variant
    for variant in (
        CpuVariant("fp32", "fp32 eager"),
        CpuVariant("fp32-compile", "fp32, each block compiled (inductor)", compiled=True),
        CpuVariant("bf16", "bf16 eager", _BF16),
        CpuVariant("bf16-compile", "bf16, each block compiled (inductor)", _BF16, compiled=True),
        CpuVariant("int8-dynamic", "torch.ao dynamic int8 linears in the blocks", peer=True),
        CpuVariant("w1.58a8", "W1.58A8 packed, backend cpu", plan="a8"),
        CpuVariant("w1.58a4", "W1.58A4 packed, backend cpu", plan="a4"),
        CpuVariant("w1.58a2", "W1.58A2 packed, backend cpu", plan="a2-uniform"),
    )
}


def bound_of(variant: CpuVariant, scope: str) -> float:
    """The largest relative RMS difference from what a variant is checked against.

    Sums in another order round a code the other way here and there, which every further block of a
    step multiplies; outputs that have nothing in common differ by 1.4.
    """
    if variant.dtype == torch.float32 and not variant.plan and not variant.peer:
        return 1e-3
    return {"block": 0.05, "step": 0.5}[scope]


def model_of(workload_model: Any, size: str, depth: int | None = None) -> Any:
    """Sizes of a model: the workload's own, or DiT-`size`/2 at 256x256; of `depth` blocks."""
    if size in SIZES:
        changes = SIZES[size]
        workload_model = load_workload(PAPER_WORKLOAD).model.model_copy(update=changes)
    return workload_model if depth is None else workload_model.model_copy(update={"depth": depth})


def build_float(model_config: Any, seed: int) -> DiT:
    """A float32 DiT in eval mode, its weights of a realistic size and its gates open, in seconds.

    Drawing every weight of DiT-XL/2 takes half a minute, which changes no time: some are repeated.
    """
    model = DiT.without_values(model_config)
    model.to_empty(device="cpu")
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed))
    for index, parameter in enumerate(model.parameters()):
        fan_in = parameter[0].numel() if parameter.dim() > 1 else model_config.hidden_size
        flat, shift = parameter.data.view(-1), 7919 * index % NOISE
        for start in range(0, flat.numel(), NOISE):
            part = flat[start : start + NOISE]
            part.copy_(noise.roll(shift)[: part.numel()])
        flat.mul_(1 / math.sqrt(fan_in))
    return model.eval().requires_grad_(False)


def build_packed(variant: CpuVariant, model_config: Any, rank: int, seed: int) -> nn.Module:
    """A packed model as its plan is evaluated: integer attention where the plan has it."""
    model = build_float(model_config, seed)
    return pack_random_(model, with_branch_rank(load_plan(variant.plan), rank), seed)


def full_precision(variant: CpuVariant, model: DiT) -> nn.Module:
    """A variant of the float32 model, sharing its weights where the dtype allows.

    Raises:
        MissingResourceError: no C++ compiler for inductor, or this torch has no int8 linears.
    """
    found = model if variant.dtype == torch.float32 else copy.deepcopy(model).to(variant.dtype)
    if variant.peer:
        return _with_blocks(found, dynamic_int8(found.blocks))
    if not variant.compiled:
        return found
    if build.compiler() is None:
        raise MissingResourceError("not run: inductor needs a C++ compiler")
    members: Any = found.blocks
    compile_block: Any = torch.compile  # a module in, a module out
    return _with_blocks(found, Blocks(compile_block(block, dynamic=False) for block in members))


def _with_blocks(model: DiT, blocks: nn.Module) -> nn.Module:
    """A model that shares everything with `model` but its blocks."""
    other = copy.copy(model)
    other._modules = {**model._modules, "blocks": blocks}
    return other


def packed_pair(packed: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A packed model on backend "integer", which defines it, and itself on "cpu"."""
    exact = prepare_for_inference(copy.deepcopy(packed), "integer")
    return exact, prepare_for_inference(packed, "cpu")


def arithmetic_of(model: nn.Module) -> str:
    """What computes the products of a packed model on backend "cpu": "compiled" or "int-mm"."""
    return str(next(m.arithmetic for m in model.modules() if hasattr(m, "arithmetic")))


class Inputs:
    """Random inputs of a block and of a step, alike for all variants of a model."""

    def __init__(self, model_config: Any, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size, channels = model_config.input_size, model_config.in_channels
        tokens = (size // model_config.patch_size) ** 2
        width = model_config.hidden_size
        self.x = torch.randn(batch, channels, size, size, generator=generator)
        self.timestep = torch.full((batch,), 500)
        self.labels = torch.randint(model_config.num_classes, (batch,), generator=generator)
        self.tokens = torch.randn(batch, tokens, width, generator=generator)
        self.condition = torch.randn(batch, width, generator=generator)

    def call(self, model: nn.Module, scope: str, dtype: torch.dtype) -> Callable[[], Tensor]:
        """A prediction of the network ("step"), or what its blocks make of tokens ("block")."""
        if scope == "step":
            x = self.x.to(dtype)
            return lambda: model(x, self.timestep, self.labels)
        blocks: Any = model.blocks
        tokens, condition = self.tokens.to(dtype), self.condition.to(dtype)
        return lambda: blocks(tokens, condition)


def difference(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of what is expected; at most 10^6, which JSON has."""
    error = (found.float() - expected).square().mean().sqrt()
    value = float(error / expected.square().mean().sqrt())
    return value if value < 1e6 else 1e6
