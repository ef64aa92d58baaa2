"""What a plan costs: parameters, multiply-accumulates, bit operations and bytes on disk.

Everything follows from the structure of the model, built on PyTorch's meta device: no weights, no
memory, no forward pass. All counts are per image and per forward pass.

Formulas (one multiply-accumulate, MAC, counts as one FLOP, as in the "119 Gflops" of DiT-XL/2):

    BitOPs          = sum over products with two quantized operands of MACs * w_bits * a_bits,
                      with w_bits from `packings.WEIGHT_COSTS`: log2(3) = 1.585 for a ternary weight
    effective FLOPs = BitOPs / 64 + MACs of every product with a full-precision operand

A 64-bit word does 64 binary multiplications at once, hence the 64 (the convention of binary
networks). It counts an 8-bit x 8-bit product as one full-precision FLOP. Elementwise work
(norms, softmax, GELU, quantization) is left out on both sides. The additions of the online
Hadamard rotation, as the small products that this suite runs, stand beside the effective FLOPs:
`compute_reduction` leaves them out, `compute_reduction_with_rotation` includes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robuq_bench.accounting.packings import (
    DEFAULT_PACKING,
    FULL_PRECISION_BITS,
    FULL_PRECISION_PACKINGS,
    INT8_PACKINGS,
    PACKINGS,
    PUBLISHED_RANK,
    READINGS,
    Packing,
    weight_cost,
)
from robuq_bench.accounting.structure import (
    LinearLayer,
    Structure,
    converted_layers,
    dit_layer_macs,
    dit_structure,
    layer_macs,
    low_rank_values,
    rotated_layers,
    ternary_layers,
    weight_quantizer,
)
from robuq_bench.allocation import mean_bits, mean_bits_by_type
from robuq_bench.errors import UsageError, suggest
from robuq_bench.hadamard.transform import hadamard_factors
from robuq_bench.quantization.convert import low_rank_of

if TYPE_CHECKING:
    from robuq_bench.config import Plan
    from robuq_bench.config.workload import ModelConfig

__all__ = ["account", "dit_layer_macs", "dit_structure", "layer_macs", "packing_table"]

BITS_PER_WORD = 64
MIB = 2**20

DIT_XL_2 = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28}
PUBLISHED_DIT_XL_2: dict[str, dict[str, object]] = {
    "macs": {"value": 119e9, "source": "facebookresearch/DiT README, 119 Gflops"},
    "size_reduction_theory": {"value": 13.2, "source": "RobuQ, from reading notes (second-hand)"},
    "size_reduction_checkpoint": {
        "value": 15.2,
        "source": "RobuQ, from reading notes (second-hand)",
    },
    "compute_reduction_theory": {
        "value": 17.3,
        "source": "RobuQ, from reading notes (second-hand); bits and counting rule not found",
    },
}


def packing_table(model_config: ModelConfig, plan: Plan) -> list[dict[str, Any]]:
    """Return one row per way of storing the quantized model, with bytes by part.

    `reading` says how a row stores ternary codes, scales, the low-rank branch and everything else;
    scales are one per output channel (`ternary-twn`) or per tensor (`ternary-absmean`).
    `size_reduction` is against every parameter in FP32 (position table included). For a plan with
    ternary weights the last rows are readings that on DiT-XL/2 at rank 16 reproduce or bound the
    published 13.2x and 15.2x; their `published` is set for DiT-XL/2 only.

    Raises:
        UsageError: a weight quantizer that no packing stores.
    """
    return _packing_table(dit_structure(model_config, plan), plan, _is_dit_xl_2(model_config))


def _packing_table(structure: Structure, plan: Plan, is_dit_xl_2: bool) -> list[dict[str, Any]]:
    ternary = ternary_layers(structure, plan)
    packings = (*PACKINGS, *INT8_PACKINGS, *READINGS) if ternary else FULL_PRECISION_PACKINGS
    return [_packed_row(structure, plan, packing, is_dit_xl_2) for packing in packings]


def _packed_row(
    structure: Structure, plan: Plan, packing: Packing, is_dit_xl_2: bool
) -> dict[str, Any]:
    ternary = ternary_layers(structure, plan)
    converted = converted_layers(structure, plan)
    with_branch = [
        layer
        for layer in converted
        if packing.adaln_low_rank or layer not in structure.adaln_linears
    ]
    has_signs = packing.has_signs and plan.rotation.kind == "randomized-hadamard"
    signed = rotated_layers(structure, plan) if has_signs else []
    parts = {
        "codes": sum(_code_bytes(layer, packing) for layer in ternary),
        "scales": packing.scale_bytes * sum(_scales(layer, plan) for layer in ternary),
        "low_rank": sum(_branch_bytes(layer, plan, packing) for layer in with_branch),
        "signs": sum(math.ceil(layer.in_features / 8) for layer in signed),
        "rest": _rest_bytes(structure, ternary, packing),
    }
    total = sum(parts.values())
    return {
        "packing": packing.name,
        "reading": packing.reading,
        **{f"{part}_bytes": size for part, size in parts.items()},
        "total_bytes": total,
        "total_mib": total / MIB,
        "size_reduction": 4 * structure.parameters / total,
        "published": packing.published if is_dit_xl_2 else None,
    }


def account(
    model_config: ModelConfig, plan: Plan, bits_by_layer: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return the whole account of a plan on a DiT as one JSON-able dict, per image and forward.

    Args:
        model_config: the workload's `model` section.
        plan: how the model is quantized.
        bits_by_layer: activation bits of every quantized block linear. None takes the plan's
            uniform bits; for an AMPN plan it takes the budget as every layer's bits, which gives
            the exact BitOPs of any allocation that spends its whole MAC-weighted budget.

    The main numbers are at the top level: `parameters`, `macs`, `weight_bits` (of the block
    linears; `adaln_weight_bits` of the modulation), `mean_activation_bits` (MAC-weighted, block
    linears; 32 when not quantized), `mean_activation_bits_by_type` (None where only the budget is
    known), `bit_ops`, `effective_flops`, `compute_reduction`, `packed_bytes` and `size_reduction`
    (packing `packing`). `*_by_part` split them; `packing_table` lists every packing; `published`
    holds the figures for DiT-XL/2. These are read at a low-rank branch of rank 16: where
    `low_rank_rank` is another, `at_published_rank` has the headline numbers at 16, and every
    packing its `size_reduction_at_rank_16`.

    Raises:
        UsageError: unknown or missing layers in `bits_by_layer`, or none for a plan that reads
            its allocation from a file; a weight quantizer of unknown cost.
        UnsupportedHadamardOrder: a rotated layer's width has no Hadamard matrix.
    """
    structure = dit_structure(model_config, plan)
    bits, source = _activation_bits(structure, plan, bits_by_layer)
    macs = {layer.name: layer.macs for layer in structure.block_linears}
    compute = _compute(structure, plan, bits)
    is_dit_xl_2 = _is_dit_xl_2(model_config)
    table = _packing_table(structure, plan, is_dit_xl_2)
    chosen = next((row for row in table if row["packing"] == DEFAULT_PACKING), table[0])
    at_published_rank: dict[str, Any] = {}
    if is_dit_xl_2 and ternary_layers(structure, plan) and plan.low_rank.rank != PUBLISHED_RANK:
        at_published_rank = _at_published_rank(model_config, plan, bits_by_layer, table)
    effective = sum(compute["effective_flops_by_part"].values())
    block_weights = sum(layer.weights for layer in structure.block_linears)
    adaln_weights = sum(layer.weights for layer in structure.adaln_linears)
    return {
        "parameters": structure.parameters,
        "parameters_by_group": {
            "block_linears": block_weights,
            "adaln_linears": adaln_weights,
            "rest": structure.parameters - block_weights - adaln_weights,
        },
        "macs": structure.macs,
        "weight_bits": weight_cost(plan.weights.quantizer).bits,
        "adaln_weight_bits": weight_cost(plan.adaln.weight_quantizer).bits,
        "low_rank_rank": plan.low_rank.rank,
        "activation_bits_source": source,
        "mean_activation_bits": mean_bits(bits, macs) if bits else FULL_PRECISION_BITS,
        "mean_activation_bits_by_type": (
            mean_bits_by_type(bits) if bits and source != "budget" else None
        ),
        **compute,
        "effective_flops": effective,
        "compute_reduction": structure.macs / effective,
        "compute_reduction_with_rotation": structure.macs
        / (effective + compute["rotation_additions"]),
        "packing": chosen["packing"],
        "packed_bytes": chosen["total_bytes"],
        "full_precision_bytes": 4 * structure.parameters,
        "size_reduction": chosen["size_reduction"],
        "packing_table": table,
        "at_published_rank": at_published_rank,
        "published": PUBLISHED_DIT_XL_2 if is_dit_xl_2 else {},
    }


def _at_published_rank(
    model_config: ModelConfig,
    plan: Plan,
    bits_by_layer: Mapping[str, int] | None,
    table: list[dict[str, Any]],
) -> dict[str, Any]:
    """Headline numbers at the published readings' rank; every row of `table` gets its reduction."""
    low_rank = plan.low_rank.model_copy(update={"rank": PUBLISHED_RANK})
    found = account(model_config, plan.model_copy(update={"low_rank": low_rank}), bits_by_layer)
    for row, other in zip(table, found["packing_table"], strict=True):
        row[f"size_reduction_at_rank_{PUBLISHED_RANK}"] = other["size_reduction"]
        row["published"] = row.pop("published")  # the last column, beside what it is read at
    names = ("low_rank_rank", "compute_reduction", "packed_bytes", "size_reduction")
    return {name: found[name] for name in names}


def _compute(structure: Structure, plan: Plan, bits: Mapping[str, float]) -> dict[str, Any]:
    """MACs, BitOPs and effective FLOPs by part, and the additions of the online rotation."""
    matmul_bits = plan.attention.matmul_bits
    block_weight_bits = _bit_op_bits(plan.weights.quantizer)
    adaln_weight_bits = _bit_op_bits(plan.adaln.weight_quantizer)
    bit_ops = {
        "block_linears": sum(
            layer.macs * block_weight_bits * bits.get(layer.name, 0)
            for layer in structure.block_linears
        ),
        "adaln_linears": sum(
            layer.macs * adaln_weight_bits * (plan.adaln.activation_bits or 0)
            for layer in structure.adaln_linears
        ),
        "attention": structure.attention_macs * (matmul_bits or 0) ** 2,
    }
    macs = {
        "block_linears": sum(layer.macs for layer in structure.block_linears),
        "adaln_linears": sum(layer.macs for layer in structure.adaln_linears),
        "attention": structure.attention_macs,
        "other": structure.other_macs,
        "low_rank": sum(
            layer.tokens * low_rank_values(layer, plan)
            for layer in converted_layers(structure, plan)
        ),
    }
    return {
        "macs_by_part": macs,
        "bit_ops": sum(bit_ops.values()),
        "bit_ops_by_part": bit_ops,
        "effective_flops_by_part": {
            part: bit_ops[part] / BITS_PER_WORD if bit_ops.get(part) else count
            for part, count in macs.items()
        },
        "rotation_additions": sum(
            layer.tokens * layer.in_features * sum(hadamard_factors(layer.in_features))
            for layer in rotated_layers(structure, plan)
        ),
    }


def _activation_bits(
    structure: Structure, plan: Plan, bits_by_layer: Mapping[str, int] | None
) -> tuple[dict[str, float], str]:
    """Return the bits of every quantized block linear (empty: none is) and where they are from."""
    names = [layer.name for layer in structure.block_linears]
    if plan.activations.quantizer == "none":
        return {}, "full precision"
    if bits_by_layer is None:
        if plan.allocation.method == "uniform":
            return dict.fromkeys(names, plan.activations.bits), "uniform"
        if plan.allocation.mean_bits is None:
            raise UsageError(
                f"plan {plan.name!r} reads its allocation from a file: pass its bits_by_layer"
            )
        return dict.fromkeys(names, plan.allocation.mean_bits), "budget"
    for name in bits_by_layer:
        if name not in names:
            raise UsageError(f"the allocation has unknown layer {name!r}{suggest(name, names)}")
    for name in names:
        if name not in bits_by_layer:
            raise UsageError(f"the allocation has no bits for layer {name!r}")
    return {name: bits_by_layer[name] for name in names}, "allocation"


def _code_bytes(layer: LinearLayer, packing: Packing) -> int:
    if packing.name.startswith("2bit/"):  # the kernels' layout: rows in blocks of 128 codes
        return layer.out_features * math.ceil(layer.in_features / 128) * 32
    return math.ceil(layer.weights * packing.bits_per_code / 8)


def _branch_bytes(layer: LinearLayer, plan: Plan, packing: Packing) -> int:
    size = packing.low_rank_bytes * low_rank_values(layer, plan)
    # int8: a float32 scale per component in either factor.
    return size + (8 * low_rank_of(layer.name, plan) if packing.low_rank_bytes == 1 else 0)


def _rest_bytes(structure: Structure, ternary: Sequence[LinearLayer], packing: Packing) -> int:
    packed = {f"{layer.name}.weight" for layer in ternary}
    shapes = [shape for name, shape in structure.shapes.items() if name not in packed]
    if packing.rest_bytes > 1:
        return packing.rest_bytes * sum(map(math.prod, shapes))
    return sum(_int8_bytes(shape) for shape in shapes)


def _int8_bytes(shape: tuple[int, ...]) -> int:
    """A matrix in int8 with a float32 scale per slice of its shorter side; a vector in fp16."""
    values = math.prod(shape)
    if len(shape) < 2:
        return 2 * values
    # As `packed_file` cuts them: a table [1, T, C] by rows, a convolution by output channels.
    rows = values // shape[-1] if len(shape) == 3 else shape[0]
    return values + 4 * min(rows, values // rows)


def _scales(layer: LinearLayer, plan: Plan) -> int:
    return layer.out_features if weight_cost(weight_quantizer(layer, plan)).scale_per_row else 1


def _bit_op_bits(quantizer: str) -> float:
    """Bits of a weight for BitOPs; 0 where the product is not a bit operation."""
    cost = weight_cost(quantizer)
    return cost.bits if cost.is_quantized else 0.0


def _is_dit_xl_2(model_config: ModelConfig) -> bool:
    return all(getattr(model_config, field) == value for field, value in DIT_XL_2.items())
