"""Every name of the library that the golden recordings touch, and nothing else.

`compute.py` measures through these functions only. When a name of the library changes, it is
changed here; what is measured, and what was recorded, stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.accounting.account import with_branch_rank
from robuq_bench.config import load_plan, load_workload
from robuq_bench.data.datasets import load_dataset
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import ConfigError
from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.inference import export_packed, pack_
from robuq_bench.methods import method_class
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.rotations.dual_rotation import fit_dual_rotation
from robuq_bench.methods.site import Site
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.convert import (
    allocatable_layers,
    quantize_,
    quantized_layers,
    set_activation_bits,
)
from robuq_bench.training import BatchSource, Trainer, qat_loss

#: A parameter of a quantized layer -> what the recordings call it.
PARTS = {
    "master_weight": "weight",
    "bias": "bias",
    "branch.up": "up",
    "branch.down": "down",
}
#: A tensor of a packed layer in its file -> what the recordings call it.
PACKED_PARTS = {
    "codes": "codes",
    "codes.int8_scale": "codes.int8_scale",
    "scale": "scale",
    "signs": "signs",
    "bias": "bias",
    "low_rank_up": "up",
    "low_rank_down": "down",
}


def plan_named(name: str) -> Any:
    """A packaged plan, its branches of rank 8, which they had when this was recorded."""
    plan = load_plan(name)
    return with_branch_rank(plan, 8) if any(rule.branch for rule in plan.layers) else plan


def bit_choices(plan: Any) -> tuple[int, ...]:
    """The bits that the plan's allocation chooses from; empty where it allocates none."""
    return () if plan.bits is None else plan.bits.choices


def teacher() -> nn.Module:
    """The shipped teacher of `digits` on the CPU, frozen, in eval mode."""
    model, _ = load_teacher(load_workload("digits"), "cpu")
    return model.requires_grad_(False).eval()


def student_of(model: nn.Module, plan: Any) -> nn.Module:
    """A quantized copy of the teacher, its parameters as QAT starts with them."""
    student = copy.deepcopy(model).requires_grad_(True)
    student.get_parameter("pos_embed").requires_grad_(False)
    return quantize_(student, plan, seed=0)


def layers_with_bits(student: nn.Module, plan: Any) -> list[str]:
    """The layers whose activation bits an allocation decides."""
    return allocatable_layers(student)


def set_bits(student: nn.Module, bits: dict[str, int]) -> None:
    """Give layers other activation bits."""
    set_activation_bits(student, bits)


def activation_bits(student: nn.Module) -> dict[str, int | None]:
    """Activation bits of every quantized layer."""
    return {name: layer.activation_bits for name, layer in quantized_layers(student).items()}


def codes_and_scales(student: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, codes int8 [out, in], scale [out, 1] or [1, 1]) of every quantized layer."""
    for name, layer in quantized_layers(student).items():
        found: Any = layer.weight_quantizer
        codes = found.codes(layer.master_weight)
        yield name, codes.codes, codes.scale


def neutral_name(parameter: str, layers: set[str]) -> str:
    """`<layer>.weight|bias|up|down` of a quantized layer's parameter, its own name elsewhere."""
    for part, neutral in PARTS.items():
        layer = parameter.removesuffix(f".{part}")
        if layer != parameter and layer in layers:
            return f"{layer}.{neutral}"
    return parameter


def parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their neutral names."""
    layers = set(quantized_layers(student))
    return {
        neutral_name(name, layers): value
        for name, value in student.named_parameters()
        if value.requires_grad
    }


def train(
    student: nn.Module, model: nn.Module, plan: Any, steps: int, batch_size: int
) -> tuple[list[float], dict[str, Tensor]]:
    """QAT as `train-and-eval` does it: the loss of every step, and the averaged weights.

    The learning rate rises over a quarter of the steps and falls to nothing over the others.
    """
    workload = load_workload("digits")
    recipe = workload.training.model_copy(
        update={"steps": steps, "batch_size": batch_size, "warmup_steps": steps // 4}
    )
    data = load_dataset(workload.data)
    diffusion = Diffusion.from_config(workload.diffusion)
    source = BatchSource(
        data.model_inputs(torch.arange(len(data))),
        data.labels,
        diffusion,
        student,
        batch_size=batch_size,
        seed=0,
        stream="qat",
        device="cpu",
    )
    loss = qat_loss(diffusion, model, plan.train.distillation_weight, plan.train.denoising_weight)
    trainer = Trainer(student, recipe, "cpu", recipe.low_rank_learning_rate)
    losses = [values["loss"] for values in trainer.train(source, loss, steps)]
    layers = set(quantized_layers(student))
    return losses, {neutral_name(name, layers): value for name, value in trainer.ema.items()}


def packed(student: nn.Module) -> nn.Module:
    """A packed copy, in eval mode; the student is left as it is."""
    return pack_(copy.deepcopy(student).eval())


def export(model: nn.Module, plan: Any, storage: str, path: Path) -> None:
    """Write a packed model to a file."""
    export_packed(
        model,
        path,
        plan=plan,
        model_config=load_workload("digits").model,
        storage=storage,
        source="golden",
    )


def neutral_packed_name(tensor: str, layers: set[str]) -> str:
    """`<layer>.<part>` of a packed layer's tensor with the part's neutral name, else as it is."""
    for layer in layers:
        part = tensor.removeprefix(f"{layer}.")
        if part != tensor:
            base = part.removesuffix(".int8_scale")
            return f"{layer}.{PACKED_PARTS[base]}{part.removeprefix(base)}"
    return tensor


def activation_methods() -> tuple[str, ...]:
    """Names of the activation quantizers."""
    return ("robust-midtread", "robust-midrise", "lloyd-max", "minmax", "bitnet")


def activation_method(
    name: str, bits: int
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], Callable[[Tensor], Tensor]] | None:
    """x -> (codes, scale, offset), and x -> fake-quantized x; None where undefined at `bits`."""
    quantizer = token_grid(name)
    try:
        quantizer.check_bits(bits)
    except ConfigError:
        return None

    def codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = quantizer.quantize(x, bits)
        return found.codes, found.scale, found.offset

    return codes, lambda x: quantizer.fake_quantize(x, bits)


def matmul_method(bits: int) -> Callable[[Tensor], Tensor]:
    """x -> fake-quantized operand of the products of attention."""
    return matmul_quantizer(bits)


def signs(width: int, layer: str, seed: int) -> Tensor:
    """The random signs of a layer's rotation."""
    return random_signs(width, layer, seed)


def rotated(x: Tensor, diagonal: Tensor | None) -> Tensor:
    """x D H over the last axis."""
    return rotate(x, diagonal)


def dual_rotation(tokens: Tensor, block: int, steps: int) -> Tensor:
    """The matrix of the dual rotation fitted to tokens [T, n]."""
    return fit_dual_rotation(tokens, block_size=block, steps=steps, seed=0).matrix()


def quantized_weight(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight [out, in] by the weight quantizer `name`."""
    method: Any = method_class("weight", name)
    codes = method(method=name).fit(weight.double(), Site()).codes(weight)
    return codes.codes, codes.scale
