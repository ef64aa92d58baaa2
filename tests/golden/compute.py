"""What is recorded of every packaged plan, and of every method alone.

Numbers are kept as float32 values (`values`, tensors), as float hex (losses), and as prints: the
SHA-256 of a tensor's bytes, which tells equal from different, beside its L2 norm, which tells near
from far on a machine that rounds differently.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

library: Any = import_module("library")  # beside this file, which is no package

ASSETS = Path(__file__).parent / "assets"
PLANS = (
    "a8",
    "a4",
    "a3",
    "a2",
    "a3-uniform",
    "a2-uniform",
    "baseline-a4",
    "baseline-a3",
    "baseline-a2",
    "bitnetv2-a4",
    "bitnetv2-a3",
)
#: How packed files are written: as they are by default, and two plans in other ways too.
STORAGES = ("base3/fp32/fp32",)
MORE_STORAGES = {
    "a2": ("2bit/fp16/fp16", "base3/int8/int8"),
    "bitnetv2-a4": ("2bit/fp16/fp16", "base3/int8/int8"),
}
IMAGES = 40
STEPS, BATCH_SIZE = 20, 16


def fingerprint() -> dict[str, Any]:
    """What decides how a CPU rounds: equal here, equal bits."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    facts = {
        key: found[1].strip()
        for key in ("model name", "cpu family", "model", "stepping")
        if (found := re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE))
    }
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpu": facts,
    }


def print_of(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and row-major bytes, and the L2 norm: "1f3a... 2.718282e+00"."""
    tensor = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)};".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{digest.hexdigest()} {float(tensor.double().norm()):.6e}"


def fixed_inputs() -> dict[str, Tensor]:
    """x [40, 1, 8, 8], t [40], y [40] (10 is no class), and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(IMAGES, 1, 8, 8, generator=generator),
        "t": torch.linspace(0, 999, IMAGES).long(),
        "y": torch.arange(IMAGES) % 11,
        "output_gradient": torch.randn(IMAGES, 1, 8, 8, generator=generator) / 8,
    }


def student_for(name: str, teacher: nn.Module) -> tuple[nn.Module, Any]:
    """The student of a plan. One that allocates bits gets them by turns, in place of AMPN's."""
    plan = library.plan_named(name)
    student = library.student_of(teacher, plan)
    choices = library.bit_choices(plan)
    if choices:
        first = int(plan.name[1])  # a2 and a3 would otherwise be one
        layers = library.layers_with_bits(student, plan)
        library.set_bits(
            student, {layer: choices[(first + i) % len(choices)] for i, layer in enumerate(layers)}
        )
    return student, plan


def of_plan(
    name: str, teacher: nn.Module, inputs: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything that is recorded of one plan: prints and losses, and outputs as tensors."""
    student, plan = student_for(name, teacher)
    arguments = (inputs["x"], inputs["t"], inputs["y"])
    record: dict[str, Any] = {"bits": library.activation_bits(student)}
    record["layers"] = {
        layer: {"codes": print_of(codes), "scale": print_of(scale)}
        for layer, codes, scale in library.codes_and_scales(student)
    }
    parameters = library.parameters(student)
    record["parameters"] = {key: print_of(value) for key, value in parameters.items()}

    training = student.train()(*arguments)
    training.backward(inputs["output_gradient"])
    record["gradients"] = {
        key: print_of(value.grad) for key, value in parameters.items() if value.grad is not None
    }
    student.zero_grad(set_to_none=True)
    with torch.inference_mode():
        evaluated = student.eval()(*arguments)
        packed = library.packed(student)
        packed_output = packed(*arguments)
    record["packed_files"] = {
        storage: packed_tensors(packed, plan, storage, set(record["layers"]))
        for storage in STORAGES + MORE_STORAGES.get(name, ())
    }
    losses, averaged = library.train(student, teacher, plan, STEPS, BATCH_SIZE)
    record["losses"] = [loss.hex() for loss in losses]
    record["averaged"] = {key: print_of(value) for key, value in averaged.items()}
    outputs = {"training": training.detach(), "eval": evaluated, "packed": packed_output}
    return record, {f"{name}/{mode}": value.clone() for mode, value in outputs.items()}


def packed_tensors(model: nn.Module, plan: Any, storage: str, layers: set[str]) -> dict[str, str]:
    """Prints of all tensors of the packed file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        library.export(model, plan, storage, path)
        tensors = load_file(path)
    return {
        library.neutral_packed_name(key, layers): print_of(value) for key, value in tensors.items()
    }


def fixed_tokens() -> Tensor:
    """Tokens [33, 144]: Gaussian of many sizes, with outliers, constant, and zero."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(33, 144, generator=generator) * torch.logspace(-3, 3, 33)[:, None]
    tokens[:, 7] *= 20
    tokens[5], tokens[6], tokens[8, 1:] = 0.0, 0.75, 0.0
    return tokens


def of_methods() -> dict[str, dict[str, str]]:
    """Prints of every quantizer and rotation on its own, at every width it has."""
    tokens = fixed_tokens()
    upstream = torch.randn(33, 144, generator=torch.Generator().manual_seed(2))
    record: dict[str, dict[str, str]] = {}
    for name in library.activation_methods():
        for bits in range(1, 9):
            method = library.activation_method(name, bits)
            if method is None:
                continue
            codes, fake = method
            found = dict(zip(("codes", "scale", "offset"), codes(tokens), strict=True))
            found |= with_gradient(fake, tokens, upstream)
            record[f"activation/{name}/{bits}"] = {k: print_of(v) for k, v in found.items()}
    for bits in (2, 4, 8):
        found = with_gradient(library.matmul_method(bits), tokens, upstream)
        record[f"matmul/{bits}"] = {k: print_of(v) for k, v in found.items()}
    for name in ("ternary-twn", "ternary-absmean"):
        codes, scale = library.quantized_weight(tokens, name)
        record[f"weight/{name}"] = {"codes": print_of(codes), "scale": print_of(scale)}
    diagonal = library.signs(144, "blocks.0.attn.qkv", 0)
    record["rotation/hadamard"] = {"tokens": print_of(library.rotated(tokens, None))}
    record["rotation/randomized-hadamard"] = {
        "signs": print_of(diagonal),
        "tokens": print_of(library.rotated(tokens, diagonal)),
    }
    matrix = library.dual_rotation(tokens, block=16, steps=16)
    record["rotation/dual"] = {"matrix": print_of(matrix)}
    return record


def with_gradient(function: Any, tokens: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The values of a function of tokens, and the gradient that it passes on."""
    x = tokens.clone().requires_grad_(True)
    values = function(x)
    values.backward(upstream)
    assert x.grad is not None
    return {"values": values.detach(), "gradient": x.grad}
