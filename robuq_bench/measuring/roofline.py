"""Least times from bytes and operations: a model, never a measurement.

One layer takes at least max(bytes / bandwidth, operations / rate). `end_to_end` adds up a whole DiT
with rates that good kernels reach, the assumptions of `H100_REACHED`:

    product     max(ops / (rate * fill), bytes / bandwidth, floor), with
                fill = max(1/2, tiles / (ceil(tiles / SMs) * SMs)) of 128 x 128 output tiles; below
                one half, smaller tiles or a split reduction take over
    elementwise max(bytes / elementwise bandwidth, floor)
    attention   max(4 tokens^2 width / attention rate, floor)
    modulation  weight bytes / bandwidth

Full-precision blocks pass over rows of `width` values 4 + 4 + 8 times (two residual-norm-modulate
kernels, one GELU). Quantized ones read and write the residual stream, read a branch and write int8
codes twice, and quantize the inputs of proj and fc2 in passes of their own; GELU is an epilogue. A
low-rank branch adds its float32 values between the two and its 16-bit products; its projection runs
under the bytes of the passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from robuq_bench.models.dit import SIZES

TILE = 128
LEAST_FILL = 0.5
PLANE_BLOCK = 128  # columns that are packed together; the last block is padded
TOKEN_BYTES = 12  # float32 scale and offset, int32 sum of codes
BRANCH_BYTES = 4  # float32, from the quantizer to the product


@dataclass(frozen=True)
class Peaks:
    """Data-sheet peaks of a device: bytes/s, and operations/s of dense products (no sparsity)."""

    name: str
    bytes_s: float
    bf16: float
    int8: float
    source: str


DATA_SHEETS = (
    Peaks("H100 SXM", 3.35e12, 989.4e12, 1978.9e12, "NVIDIA H100 data sheet, SXM5, dense"),
    Peaks("H200 SXM", 4.8e12, 989.4e12, 1978.9e12, "NVIDIA H200 data sheet, SXM, dense"),
    Peaks("A100 SXM", 2.039e12, 312e12, 624e12, "NVIDIA A100 data sheet, SXM 80 GB, dense"),
    Peaks("RTX 4090", 1.008e12, 165.2e12, 660.6e12, "NVIDIA Ada whitepaper, fp32 sums, dense"),
)


@dataclass(frozen=True)
class Product:
    """Linear layer on `rows` tokens: [rows, width] -> [rows, outputs], `groups` times."""

    rows: int
    width: int
    outputs: int
    groups: int = 1
    rank: int = 0
    has_residual: bool = False

    @property
    def operations(self) -> int:
        """Two per multiply-accumulate, without the low-rank branch."""
        return 2 * self.groups * self.rows * self.width * self.outputs

    @property
    def branch_operations(self) -> int:
        """Of the low-rank branch from `rank` to the outputs, which are 16-bit products."""
        return 2 * self.groups * self.rows * self.rank * self.outputs

    @property
    def full_precision_bytes(self) -> int:
        """Weight, input and output in bf16, each moved once."""
        values = self.width * self.outputs + self.rows * (self.width + self.outputs)
        return 2 * self.groups * values

    @property
    def weight_bytes(self) -> int:
        """Packed weight: two bits a code, blocks of 128 columns."""
        return self.groups * self.outputs * -(-self.width // PLANE_BLOCK) * PLANE_BLOCK // 4

    @property
    def ternary_bytes(self) -> int:
        """Packed weight, int8 codes and what is kept per token, output (and residual) in bf16."""
        per_channel = self.groups * self.outputs * (4 + 4 + 2)  # scale, sum, bias
        tokens = self.groups * self.rows * (self.width + TOKEN_BYTES)
        out = 2 * self.groups * self.rows * self.outputs * (2 if self.has_residual else 1)
        branch = self.groups * self.rank * (BRANCH_BYTES * self.rows + 2 * self.outputs)
        return self.weight_bytes + per_channel + tokens + out + branch


@dataclass(frozen=True)
class Quantization:
    """Rotation and quantization of `rows` tokens of `width`; `groups` results from one input.

    `has_residual`: a gated branch is added first and the sum written back.
    """

    rows: int
    width: int
    groups: int = 1
    rank: int = 0
    has_residual: bool = False

    @property
    def bytes_moved(self) -> int:
        """bf16 input (with a residual: branch in, sum out), int8 codes, token facts, branch."""
        row = 2 * self.width * (3 if self.has_residual else 1)
        out = self.groups * (self.width + TOKEN_BYTES + BRANCH_BYTES * self.rank)
        factors = 2 * self.groups * self.rank * self.width
        return self.rows * (row + out) + factors

    @property
    def branch_operations(self) -> int:
        """Of the low-rank branch from the tokens to `rank`, which are 16-bit products."""
        return 2 * self.groups * self.rows * self.width * self.rank


def least_seconds(
    moved_bytes: float, operations: float, bytes_s: float, ops_s: float
) -> tuple[float, str]:
    """Roofline time and what sets it, "memory" or "compute"."""
    memory, compute = moved_bytes / bytes_s, operations / ops_s
    return (memory, "memory") if memory >= compute else (compute, "compute")


@dataclass(frozen=True)
class Assumptions:
    """Rates of the end-to-end model. `products` and `attention`: operations/s by precision."""

    name: str
    products: dict[str, float] = field(default_factory=dict)
    attention: dict[str, float] = field(default_factory=dict)
    bytes_s: float = 3.0e12
    elementwise_bytes_s: float = 2.6e12
    floor_s: float = 2.5e-6
    multiprocessors: int = 132


H100_REACHED = Assumptions(
    "H100: bf16 650, int8 1200, TF32 370, FP32 50 TFLOP/s; attention 300, 150, 50; "
    "3.0 TB/s, elementwise 2.6; at least 2.5 us a kernel",
    products={"int8": 1200e12, "bf16": 650e12, "tf32": 370e12, "fp32": 50e12},
    attention={"int8": 300e12, "bf16": 300e12, "tf32": 150e12, "fp32": 50e12},
)
PRECISIONS = ("bf16", "int8", "tf32", "fp32")


@dataclass(frozen=True)
class Transformer:
    """The sizes of a DiT that the end-to-end model reads; `tokens` are those of one image."""

    width: int
    depth: int
    tokens: int = 256
    mlp_ratio: float = 4.0

    @classmethod
    def named(cls, size: str, tokens: int = 256) -> Transformer:
        """One of the paper's sizes: S, B, L or XL."""
        return cls(SIZES[size]["hidden_size"], SIZES[size]["depth"], tokens)

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of the four linear layers of a block."""
        c, h = self.width, self.hidden
        return {"qkv": (c, 3 * c), "proj": (c, c), "fc1": (c, h), "fc2": (h, c)}


def end_to_end(
    model: Transformer,
    images: int,
    precision: str,
    rates: Assumptions = H100_REACHED,
    rank: int = 0,
) -> dict[str, float]:
    """Seconds of one forward pass on `images` images, by part, and their `total_s`.

    `precision` is "bf16", "tf32" or "fp32" of a compiled full-precision model, or "int8" of the
    packed ternary one, with low-rank branches of `rank` beside the layers of its blocks.
    """
    rows = images * model.tokens
    value_bytes = {"int8": 2, "bf16": 2, "tf32": 4, "fp32": 4}[precision]
    products = 0.0
    for width, outputs in model.linears().values():
        product = Product(rows, width, outputs, rank=rank if precision == "int8" else 0)
        moved = (
            product.ternary_bytes
            if precision == "int8"
            else product.full_precision_bytes * value_bytes // 2
        )
        tiles = math.ceil(rows / TILE) * math.ceil(outputs / TILE)
        slots = math.ceil(tiles / rates.multiprocessors) * rates.multiprocessors
        rate = rates.products[precision] * max(LEAST_FILL, tiles / slots)
        branch = product.branch_operations * rates.products["int8"] / rates.products["bf16"]
        operations = product.operations + branch  # the branch as so many 8-bit operations
        least, _ = least_seconds(moved, operations, rates.bytes_s, rate)
        products += max(least, rates.floor_s)
    c, h = model.width, model.hidden
    if precision == "int8":
        # norm + modulate twice: stream in, branch in, stream out, codes out; then proj, fc2 inputs.
        row_bytes = [2 * 3 * c + c, 2 * 3 * c + c, 2 * c + c, 2 * h + h]
        row_bytes = [n + BRANCH_BYTES * rank for n in row_bytes]
    else:
        row_bytes = [value_bytes * n for n in (4 * c, 4 * c, 2 * h)]
    elementwise = sum(max(rows * n / rates.elementwise_bytes_s, rates.floor_s) for n in row_bytes)
    flops = 4 * images * model.tokens**2 * c
    attention = max(flops / rates.attention[precision], rates.floor_s)
    modulation = Product(1, c, 6 * c)
    weights = modulation.weight_bytes if precision == "int8" else value_bytes * 6 * c * c
    parts = {
        "products_s": model.depth * products,
        "elementwise_s": model.depth * elementwise,
        "attention_s": model.depth * attention,
        "modulation_s": model.depth * weights / rates.bytes_s,
    }
    return {**parts, "total_s": sum(parts.values())}


def end_to_end_rows(
    model: Transformer, images: list[int], rates: Assumptions = H100_REACHED, rank: int = 0
) -> list[dict[str, Any]]:
    """The model's table: one row per number of images (with guidance, two per sample)."""
    rows = []
    for count in images:
        found = {name: end_to_end(model, count, name, rates, rank) for name in PRECISIONS}
        ternary = found["int8"]
        rows.append(
            {
                "basis": "model, not measured",
                "assumptions": rates.name,
                "rank": rank,
                "images": count,
                "tokens": count * model.tokens,
                **{
                    f"{label}_{part.removesuffix('_s')}_ms": seconds * 1e3
                    for label, parts in (("bf16", found["bf16"]), ("w1.58a8", ternary))
                    for part, seconds in parts.items()
                },
                "ratio_to_bf16": found["bf16"]["total_s"] / ternary["total_s"],
                "ratio_to_tf32": found["tf32"]["total_s"] / ternary["total_s"],
                "ratio_to_fp32": found["fp32"]["total_s"] / ternary["total_s"],
            }
        )
    return rows
