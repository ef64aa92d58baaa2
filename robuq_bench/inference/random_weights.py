"""A packed model with random weights, for sizes and speeds, in seconds and without a teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.config import Plan
from robuq_bench.errors import UsageError
from robuq_bench.hadamard.rotation import random_signs
from robuq_bench.inference.packed_linear import PackedLinear
from robuq_bench.methods import Method
from robuq_bench.methods.activations._token_grid import GridMethod, GridQuantizer
from robuq_bench.methods.branches.svd import SVD, LowRankBranch
from robuq_bench.methods.rotations._hadamard import HadamardMethod, HadamardRotation
from robuq_bench.methods.weights._ternary import TernaryMethod
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.convert import target_layers
from robuq_bench.quantization.module_tree import exchange_layers
from robuq_bench.quantization.selection import select_layers

_KNOWN: dict[str, type[Method]] = {
    "rotation": HadamardMethod,
    "branch": SVD,
    "weight": TernaryMethod,
    "activation": GridMethod,
}


@torch.no_grad()
def pack_random_(model: nn.Module, plan: Plan, seed: int = 0) -> nn.Module:
    """Replace the layers that `plan` quantizes by `PackedLinear`s of random codes, as `pack_` does.

    Shapes, bits, rotations and ranks are the plan's, so bytes and times are those of a trained
    model; its images are noise. Each of the three codes is equally likely.

    Args:
        model: unquantized; codes are drawn on its device. The layers that stay keep their weights.
        plan: with ternary weights; an allocation is taken at the bits that its rules say.
        seed: of codes and factors.

    Raises:
        UsageError: the plan keeps the weights of a layer in full precision, or has methods that the
            kernels do not know; nothing was changed.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    layers = target_layers(model, plan)
    if plan.is_full_precision or not layers:
        raise UsageError(f"plan {plan.name!r} quantizes no layer of {type(model).__name__}")
    selected = select_layers(model, plan)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, linear in layers.items():
        methods = selected[name].rule.slots()  # type: ignore[union-attr]
        weight, rotation = methods.get("weight"), methods.get("rotation")
        activation: Any = methods.get("activation")
        for method in methods.values():
            if not isinstance(method, _KNOWN.get(method.slot, ())):
                raise UsageError(
                    f"plan {plan.name!r}: {method.slot} method {method.method!r} of {name!r} has "
                    "no random form, which is for ternary weights and what kernels compute with "
                    "them; export a run of the plan instead"
                )
        if not isinstance(weight, TernaryMethod):
            raise UsageError(f"plan {plan.name!r} does not quantize the weight of {name!r}")
        out_features, in_features = linear.out_features, linear.in_features
        codes = torch.randint(
            -1, 2, (out_features, in_features), generator=generator, device=device
        )
        count = out_features if weight.scale_per_row else 1
        scale = 1 + 0.1 * torch.rand(count, generator=generator, device=device)
        scale /= math.sqrt(in_features)
        branch = methods.get("branch")
        rank = branch.rank_of(out_features, in_features) if isinstance(branch, SVD) else 0
        slots: dict[str, nn.Module] = {}
        if rank:
            up = normal(out_features, rank) / math.sqrt(rank)
            slots["branch"] = LowRankBranch(up, normal(rank, in_features) / math.sqrt(in_features))
        if rotation is not None:
            signs = None
            if rotation.method == "randomized-hadamard":
                signs = random_signs(in_features, name, seed).to(device)
            slots["rotation"] = HadamardRotation(signs)
        if activation is not None:
            slots["activation"] = GridQuantizer(activation.grid)
        replacements[linear] = PackedLinear(
            codes.to(torch.int8),
            scale,
            linear.bias,
            name=name,
            slots=slots,
            activation_bits=None if activation is None else activation.bits,
            dtype=linear.weight.dtype,
        )
    model = exchange_layers(model, replacements)
    if plan.attention.matmul_bits is not None:
        for module in model.modules():
            if hasattr(module, "matmul_quantizer"):
                module.matmul_quantizer = matmul_quantizer(plan.attention.matmul_bits)  # type: ignore[assignment]
    return model.eval()
