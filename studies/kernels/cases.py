"""The shapes at which `study kernels` runs each kernel, and their random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from robuq_bench.measuring.roofline import Product, Quantization, Transformer
from robuq_bench.models.dit import SIZES

QUANTIZE, MATMUL, GROUPED = "hadamard_quantize", "ternary_matmul", "grouped_ternary_matmul"
ATTENTION = "quantized_attention"
FAKE, FAKE_BACKWARD = "fake_quantize", "fake_quantize_backward"
WEIGHT = "ternary_weight"
KERNELS = (QUANTIZE, MATMUL, GROUPED, ATTENTION, FAKE, FAKE_BACKWARD, WEIGHT)
OURS = "robuq-bench"  # beside the names of peers
# Of ours on a CPU, the first with the name of an instruction set behind it, and of torch's.
COMPILED, INT_MM, PLAIN = "compiled, ", "torch._int_mm", "plain PyTorch"
FP32, BF16, INT8 = "F.linear fp32", "F.linear bf16", "torch.ao int8 dynamic"
CPU_PEERS = (FP32, BF16, INT8)
WEIGHT_RULE = "ternary-twn"
ATTENTION_LIMIT = 127  # 8 bits, as in the plans
_MODULES = {GROUPED: MATMUL, FAKE_BACKWARD: FAKE}
QUANTIZER = "robust-midtread"


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: [rows, width] (-> [rows, outputs]), for `groups` layers at once.

    `layer` names the place in a DiT block; `images` counts both halves of a guided batch;
    `prologue` is "", "modulate", "residual+modulate" or "silu", `epilogue` is "", "gelu" or "gate".
    """

    kernel: str
    layer: str
    model: str
    images: int
    rows: int
    width: int
    outputs: int = 0
    groups: int = 1
    rank: int = 16
    bits: int = 8
    prologue: str = ""
    epilogue: str = ""

    @property
    def key(self) -> str:
        """Name of the item in a run."""
        layer = self.layer.replace(" ", "-")
        return f"{self.kernel}/{self.model}/{layer}/images{self.images}"

    @property
    def facts(self) -> dict[str, Any]:
        """Columns that say what was run."""
        return {
            "kernel": self.kernel,
            "model": self.model,
            "layer": self.layer,
            "images": self.images,
            "rows": self.rows,
            "width": self.width,
            "outputs": self.outputs or None,
            "groups": self.groups,
            "rank": self.rank,
            "bits": self.bits,
            "includes": self.prologue or self.epilogue or "nothing else",
        }

    @property
    def is_product(self) -> bool:
        return self.kernel in (MATMUL, GROUPED)

    @property
    def product(self) -> Product:
        has_residual = self.epilogue == "gate"
        return Product(self.rows, self.width, self.outputs, self.groups, self.rank, has_residual)

    @property
    def moved_bytes(self) -> int:
        """Least bytes that the kernel moves."""
        if self.is_product:
            return self.product.ternary_bytes
        if self.kernel == QUANTIZE:
            has_residual = self.prologue.startswith("residual")
            return Quantization(
                self.rows, self.width, self.groups, self.rank, has_residual
            ).bytes_moved
        if self.kernel == WEIGHT:
            return self.rows * self.width * (4 + 2)  # float32 master weight, bf16 out
        if self.kernel == ATTENTION:
            return self.rows * self.width * (3 * 2 + 2)  # queries, keys and values in, bf16 out
        # Two bytes a value in and out, one byte of state between the passes.
        return self.rows * self.width * (2 + 2 + 1)

    @property
    def operations(self) -> int:
        """Of the product alone, of attention both; what a transform computes is not counted."""
        if self.kernel == ATTENTION:
            return 4 * self.rows * self.width * self.tokens
        return self.product.operations if self.is_product else 0

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.rows // self.images

    @property
    def heads(self) -> int:
        """Of attention."""
        return SIZES[self.model]["num_heads"]

    @property
    def copied_bytes(self) -> int:
        """Bytes of what a copy for cold-cache timing holds: packed weight, or input."""
        if self.is_product:
            return self.product.weight_bytes
        value = {WEIGHT: 4, ATTENTION: 3 * 2}.get(self.kernel, 2)
        return value * self.rows * self.width

    def reduced(self, rows: int, outputs: int) -> Case:
        """The same widths with few rows and outputs, for the interpreter: 2 images, 2 groups."""
        rows = max(2, rows // 2 * 2)
        per_image = self.kernel == GROUPED or self.prologue == "silu"
        return replace(
            self,
            images=2,
            rows=2 if per_image else rows,
            outputs=min(self.outputs, outputs),
            groups=min(self.groups, 2),
        )


def cases_of(
    model: str, images: int, *, tokens: int = 256, rank: int = 16, bits: int = 8
) -> list[Case]:
    """Every kernel call of one step of a DiT, repeated shapes once, and those of a training step.

    Args:
        model: S, B, L or XL.
        images: batch, doubled by guidance.
        tokens: of one image.
        rank, bits: of the low-rank branch and the activations.
    """
    dit = Transformer.named(model, tokens)
    rows, c, h = images * tokens, dit.width, dit.hidden

    def case(kernel: str, layer: str, rows: int, width: int, **rest: Any) -> Case:
        return Case(kernel, layer, model, images, rows, width, rank=rank, bits=bits, **rest)

    return [
        case(QUANTIZE, "qkv and fc1 input", rows, c, prologue="modulate"),
        case(QUANTIZE, "residual and fc1 input", rows, c, prologue="residual+modulate"),
        case(QUANTIZE, "proj input", rows, c),
        case(QUANTIZE, "fc2 input", rows, h),
        case(QUANTIZE, "adaLN input", images, c, groups=dit.depth, prologue="silu"),
        case(MATMUL, "qkv", rows, c, outputs=3 * c),
        case(MATMUL, "proj", rows, c, outputs=c, epilogue="gate"),
        case(MATMUL, "fc1", rows, c, outputs=h, epilogue="gelu"),
        case(MATMUL, "fc2", rows, h, outputs=c, epilogue="gate"),
        case(ATTENTION, "attention", rows, c),
        case(GROUPED, "adaLN of all blocks", images, c, outputs=6 * c, groups=dit.depth),
        case(FAKE, "training width C", rows, c),
        case(FAKE, "training width 4C", rows, h),
        case(FAKE_BACKWARD, "training width C", rows, c),
        case(FAKE_BACKWARD, "training width 4C", rows, h),
    ]


def weight_cases_of(model: str, rank: int = 16, bits: int = 8) -> list[Case]:
    """The fake quantization of the weights of fc1 and fc2, which no batch changes (images 0)."""
    dit = Transformer.named(model)
    shapes = {"fc1 weight": (dit.hidden, dit.width), "fc2 weight": (dit.width, dit.hidden)}
    return [
        Case(WEIGHT, layer, model, 0, outputs, width, rank=rank, bits=bits)
        for layer, (outputs, width) in shapes.items()
    ]


def make_inputs(
    case: Case, device: torch.device | str, seed: int = 0, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Random arguments of the kernel (zeros would run faster), bf16 where a network has bf16.

    On the CPU fp16 takes its place: Triton's interpreter truncates to bf16 instead of rounding.
    `dtype` takes the place of both.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = half_dtype(device) if dtype is None else dtype
    if case.is_product:
        return _product_inputs(case, device, generator, dtype)
    if case.kernel == ATTENTION:
        qkv = _normal(generator, case.images, case.tokens, 3 * case.width, dtype=dtype)
        return {"qkv": qkv, "heads": case.heads, "limit": ATTENTION_LIMIT, "out_dtype": dtype}
    if case.kernel == WEIGHT:
        weight = _normal(generator, case.rows, case.width, dtype=torch.float32)
        return {"weight": weight / 32, "rule": WEIGHT_RULE, "out_dtype": dtype}
    return _transform_inputs(case, device, generator, dtype)


def half_dtype(device: torch.device | str) -> torch.dtype:
    """Two-byte dtype of inputs and outputs there: bf16, and fp16 in the interpreter."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float16


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _product_inputs(
    case: Case, device: torch.device | str, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Any]:
    from kernels.ternary_matmul.layout import pack_planes

    normal = partial(_normal, generator, dtype=dtype)
    group = (case.groups,) if case.kernel == GROUPED else ()
    m, n, k = case.rows, case.outputs, case.width

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(
            low, high, (*group, *shape), generator=generator, device=device, dtype=torch.int8
        )

    half = 2 ** (case.bits - 1)
    codes, weights = integers(-half, half, m, k), integers(-1, 2, n, k)
    uniform = torch.rand((*group, m), generator=generator, device=device)
    inputs: dict[str, Any] = {
        "codes": codes,
        "planes": pack_planes(weights),
        "token_scale": (0.5 + uniform) / half,
        "token_offset": _normal(generator, *group, m, dtype=torch.float32) / 8,
        "code_sums": codes.sum(-1, dtype=torch.int32),
        "channel_scale": (0.5 + torch.rand((*group, n), generator=generator, device=device))
        / math.sqrt(k),
        "weight_sums": weights.sum(-1, dtype=torch.int32),
        "bias": normal(*group, n),
        "out_dtype": dtype,
    }
    if case.rank:
        # float32, as the kernel before it writes the branch.
        inputs["branch"] = _normal(generator, *group, m, case.rank, dtype=torch.float32)
        inputs["up"] = normal(*group, n, case.rank) / math.sqrt(case.rank)
    if case.epilogue == "gelu":
        inputs["gelu"] = True
    if case.epilogue == "gate":
        inputs["gate"] = normal(case.images, n)
        inputs["residual"] = normal(m, n)
        inputs["tokens_per_image"] = m // case.images
    return inputs


def _transform_inputs(
    case: Case, device: torch.device | str, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Any]:
    from robuq_bench.quantization.grids import grid_of, kernel_rotation

    normal = partial(_normal, generator, dtype=dtype)
    m, k = case.rows, case.width
    grid, rotation = grid_of(QUANTIZER, case.bits), kernel_rotation(k, torch.device(device))
    group = (case.groups,) if case.prologue == "silu" else ()
    signs = torch.randint(0, 2, (*group, k), generator=generator, device=device) * 2.0 - 1.0
    inputs: dict[str, Any] = {"grid": grid, "rotation": rotation, "signs": signs}
    if case.kernel == FAKE_BACKWARD:
        values = normal(m, k)
        forward = import_module("kernels.fake_quantize.reference").fake_quantize(values, **inputs)
        return inputs | {"grad": normal(m, k), "state": forward.state}
    inputs["x"] = normal(m, k)
    if case.kernel == FAKE:
        return inputs
    if case.rank:
        inputs["down"] = normal(*group, case.rank, k) / math.sqrt(k)
    reference = import_module("kernels.hadamard_quantize.reference")
    if case.prologue == "silu":
        inputs["silu"] = True
    if case.prologue.startswith("residual"):
        inputs["gated_residual"] = reference.GatedResidual(
            normal(m, k), normal(case.images, k), m // case.images
        )
    if case.prologue.endswith("modulate"):
        inputs["modulation"] = reference.Modulation(
            normal(case.images, k), normal(case.images, k), m // case.images
        )
    return inputs


def kernel_function(case: Case, backend: str) -> Callable[..., Any]:
    """The launcher ("triton") or the reference ("reference") of a case's kernel."""
    module = import_module(f"kernels.{_MODULES.get(case.kernel, case.kernel)}.{backend}")
    function: Callable[..., Any] = getattr(module, case.kernel)
    return function
