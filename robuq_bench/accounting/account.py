"""What a plan costs: parameters, multiply-accumulates, bit operations and bytes on disk.

Everything follows from the structure of the model, built on PyTorch's meta device, and from what
the plan's methods say of each layer: no weights, no memory, no forward pass. All counts are per
image and per forward pass.

Formulas (one multiply-accumulate, MAC, counts as one FLOP, as in the "119 Gflops" of DiT-XL/2):

    BitOPs          = sum over products with two quantized operands of MACs * w_bits * a_bits,
                      with nominal bits: log2(3) = 1.585 for a ternary weight
    effective FLOPs = BitOPs / 64 + MACs of every product with a full-precision operand

A 64-bit word does 64 binary multiplications at once, hence the 64 (the convention of binary
networks). It counts an 8-bit x 8-bit product as one full-precision FLOP. Elementwise work
(norms, softmax, GELU, quantization) is left out on both sides. The additions of the online
Hadamard rotation, as the small products that this suite runs, and those of a centring stand beside
the effective FLOPs; `compute_reduction_with_rotation` includes them, `compute_reduction` does not.

Nominal bits are those of a code. Effective bits share out the scales and zero points, 16 bits each:

    weights      stored bits / weights
    activations  bits + 16 * scales and zero points of a token / elements of a token
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robuq_bench.accounting.layer_costs import LayerCost, PlanCosts, plan_costs
from robuq_bench.accounting.packings import (
    DEFAULT_PACKING,
    DENSE_PACKINGS,
    FULL_PRECISION_PACKINGS,
    INT8_PACKINGS,
    PACKINGS,
    PUBLISHED_RANK,
    READINGS,
    Packing,
)
from robuq_bench.accounting.structure import (
    LinearLayer,
    Structure,
    allocatable,
    dit_layer_inputs,
    dit_layer_macs,
    dit_layer_weights,
    dit_structure,
    layer_macs,
)
from robuq_bench.allocation import mean_bits, mean_bits_by_type
from robuq_bench.methods import read_method
from robuq_bench.methods.base import FULL_PRECISION_BITS

if TYPE_CHECKING:
    from robuq_bench.config import Plan, Rule
    from robuq_bench.config.workload import ModelConfig

__all__ = [
    "account",
    "allocatable",
    "dit_layer_inputs",
    "dit_layer_macs",
    "dit_layer_weights",
    "dit_structure",
    "layer_macs",
    "packing_table",
    "with_branch_rank",
]

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


def packing_table(
    model_config: ModelConfig, plan: Plan, bits_by_layer: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Return one row per way of storing the quantized model, with bytes by part.

    `reading` says how a row stores ternary codes, scales, the low-rank branch and everything else;
    other codes take the bits that their method says, without gaps. Scales and zero points are as
    many as the methods say, such as one per output channel (`ternary-twn`) or per tensor
    (`ternary-absmean`); scales and centres of inputs are among them. `signs_bytes` is what
    rotations store. The int8 rows are there where every branch is one of two factors.
    `size_reduction` is against every parameter in FP32 (position table included). For a plan with
    no other codes than ternary ones the last rows are readings that on DiT-XL/2 at rank 16
    reproduce or bound the published 13.2x and 15.2x; their `published` is set for DiT-XL/2 only.

    Raises:
        UsageError, ConfigError: as `account`.
    """
    structure = dit_structure(model_config, plan)
    if bits_by_layer is None and plan.bits is not None and plan.bits.of == "activation":
        plan = plan.model_copy(update={"bits": None})  # activations are not stored
    costs = plan_costs(structure, plan, bits_by_layer)
    return _packing_table(structure, costs, _is_dit_xl_2(model_config))


def _packing_table(
    structure: Structure, costs: PlanCosts, is_dit_xl_2: bool
) -> list[dict[str, Any]]:
    packings = FULL_PRECISION_PACKINGS
    if costs.ternary:
        is_published = len(costs.ternary) == len(costs.with_codes)
        packings = (*PACKINGS, *INT8_PACKINGS, *(READINGS if is_published else ()))
    elif costs.with_codes:
        packings = DENSE_PACKINGS
    if any(cost.branch_rank is None for cost in costs.layers):
        packings = tuple(packing for packing in packings if packing.low_rank_bytes != 1)
    return [_packed_row(structure, costs, packing, is_dit_xl_2) for packing in packings]


def _packed_row(
    structure: Structure, costs: PlanCosts, packing: Packing, is_dit_xl_2: bool
) -> dict[str, Any]:
    with_branch = [
        cost for cost in costs.layers if packing.adaln_low_rank or cost.layer.kind != "adaLN"
    ]
    rotated = costs.layers if packing.has_signs else ()
    parts = {
        "codes": sum(_code_bytes(cost, packing) for cost in costs.with_codes),
        "scales": math.ceil(packing.scale_bytes * sum(c.stored_scales for c in costs.layers)),
        "low_rank": sum(_branch_bytes(cost, packing) for cost in with_branch),
        "signs": sum(math.ceil(cost.rotation_bits / 8) for cost in rotated),
        "rest": _rest_bytes(structure, costs, packing),
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
        bits_by_layer: what the plan allocates, bits of activations or weights, for every layer
            that has some to choose. None takes what the rules say. Of a plan with `bits.mean` it
            takes the mean as every layer's bits, which gives the exact BitOPs of any allocation
            that spends its whole budget; where that would not be so, it is an error.

    The main numbers are at the top level: `parameters`, `macs`, `weight_bits` (nominal, of the
    block linears; `adaln_weight_bits` of the modulation; None where layers differ),
    `mean_activation_bits` (MAC-weighted, quantized block linears; 32 when not quantized),
    `mean_activation_bits_by_type` (None where only the budget is known), `bit_ops`,
    `effective_flops`, `compute_reduction`, `packed_bytes` and `size_reduction` (packing
    `packing`). `*_by_part` split them; `bits_by_kind` has nominal and effective bits of the
    quantized layers side by side, means over weights and over MACs, 32 for an empty slot;
    `packing_table` lists every packing; `published` holds the figures for DiT-XL/2. These are read
    at a low-rank branch of rank 16: where `low_rank_rank` (None where layers differ) is another,
    `at_published_rank` has the headline numbers at 16, and every packing its
    `size_reduction_at_rank_16`.

    Raises:
        UsageError: unknown or missing layers in `bits_by_layer`, or none for a plan that reads
            its allocation from a file; a method that does not say what it costs.
        ConfigError, UnsupportedHadamardOrder: a method cannot serve a layer, such as a rotation a
            width without a Hadamard matrix.
    """
    structure = dit_structure(model_config, plan)
    costs = plan_costs(structure, plan, bits_by_layer)
    blocks = [cost for cost in costs.layers if cost.layer.kind == "block"]
    bits: dict[str, float] = {}
    if any(cost.input is not None for cost in blocks):
        bits = {cost.layer.name: cost.input_bits for cost in blocks}
    macs = {layer.name: layer.macs for layer in structure.block_linears}
    compute = _compute(structure, plan, costs)
    is_dit_xl_2 = _is_dit_xl_2(model_config)
    table = _packing_table(structure, costs, is_dit_xl_2)
    chosen = next((row for row in table if row["packing"] == DEFAULT_PACKING), table[0])
    at_published_rank: dict[str, Any] = {}
    if is_dit_xl_2 and any(row["published"] for row in table):
        at_published_rank = _at_published_rank(model_config, plan, costs, bits_by_layer, table)
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
        "weight_bits": _uniform_weight_bits(costs, "block"),
        "adaln_weight_bits": _uniform_weight_bits(costs, "adaLN"),
        "weight_bits_source": costs.weight_source,
        "low_rank_rank": costs.branch_rank,
        "activation_bits_source": costs.activation_source,
        "mean_activation_bits": mean_bits(bits, macs) if bits else FULL_PRECISION_BITS,
        "mean_activation_bits_by_type": (
            mean_bits_by_type(bits) if bits and costs.activation_source != "budget" else None
        ),
        **compute,
        "effective_flops": effective,
        "compute_reduction": structure.macs / effective,
        "compute_reduction_with_rotation": structure.macs
        / (effective + compute["rotation_additions"] + compute["centring_additions"]),
        "packing": chosen["packing"],
        "packed_bytes": chosen["total_bytes"],
        "full_precision_bytes": 4 * structure.parameters,
        "size_reduction": chosen["size_reduction"],
        "bits_by_kind": _bits_by_kind(structure, costs),
        "packing_table": table,
        "at_published_rank": at_published_rank,
        "published": PUBLISHED_DIT_XL_2 if is_dit_xl_2 else {},
    }


def with_branch_rank(plan: Plan, rank: int) -> Plan:
    """The plan with low-rank branches of `rank`: where it has some, or in every layer.

    Rank 0 takes them away. Branches of other methods stay as they are.
    """
    branch = read_method("branch", {"method": "svd", "rank": rank})
    has_some = any(rule.branch is not None for rule in plan.layers)

    def changed(rule: Rule) -> Rule:
        old = rule.branch
        is_wanted = old.method == "svd" if old is not None else not has_some and rule.slots()
        return rule.model_copy(update={"branch": branch}) if is_wanted else rule

    return plan.model_copy(update={"layers": tuple(map(changed, plan.layers))})


def _at_published_rank(
    model_config: ModelConfig,
    plan: Plan,
    costs: PlanCosts,
    bits_by_layer: Mapping[str, int] | None,
    table: list[dict[str, Any]],
) -> dict[str, Any]:
    """Headline numbers at the published readings' rank; every row of `table` gets its reduction."""
    other_plan = with_branch_rank(plan, PUBLISHED_RANK)
    if costs.branch_rank == PUBLISHED_RANK or other_plan == plan:
        return {}
    found = account(model_config, other_plan, bits_by_layer)
    for row, other in zip(table, found["packing_table"], strict=True):
        row[f"size_reduction_at_rank_{PUBLISHED_RANK}"] = other["size_reduction"]
        row["published"] = row.pop("published")  # the last column, beside what it is read at
    names = ("low_rank_rank", "compute_reduction", "packed_bytes", "size_reduction")
    return {name: found[name] for name in names}


def _compute(structure: Structure, plan: Plan, costs: PlanCosts) -> dict[str, Any]:
    """MACs, BitOPs and effective FLOPs by part, and the additions before quantization."""
    by_name = {cost.layer.name: cost for cost in costs.layers}
    linears = {"block_linears": structure.block_linears, "adaln_linears": structure.adaln_linears}
    if structure.other_linears:
        linears["other_linears"] = structure.other_linears
    bit_ops: dict[str, float] = {
        part: sum(by_name[layer.name].bit_ops for layer in layers if layer.name in by_name)
        for part, layers in linears.items()
    }
    bit_ops["attention"] = structure.attention_macs * (plan.attention.matmul_bits or 0) ** 2
    macs = {
        **{part: sum(layer.macs for layer in layers) for part, layers in linears.items()},
        "attention": structure.attention_macs,
        "other": structure.other_macs,
        "low_rank": sum(cost.layer.tokens * cost.branch_values for cost in costs.layers),
    }
    rotation_macs = sum(cost.layer.tokens * cost.rotation_macs for cost in costs.layers)
    if rotation_macs:  # products of full precision, which a Hadamard transform has none of
        macs["rotation"] = rotation_macs
    flops: dict[str, float] = {
        part: bit_ops[part] / BITS_PER_WORD if bit_ops.get(part) else count
        for part, count in macs.items()
    }
    for part, layers in linears.items():
        if bit_ops[part]:
            flops[part] += _full_precision_macs(layers, by_name)
    return {
        "macs_by_part": macs,
        "bit_ops": sum(bit_ops.values()),
        "bit_ops_by_part": bit_ops,
        "effective_flops_by_part": flops,
        "rotation_additions": sum(
            cost.layer.tokens * cost.rotation_additions for cost in costs.layers
        ),
        "centring_additions": sum(
            cost.layer.tokens * cost.centring_additions for cost in costs.layers
        ),
    }


def _full_precision_macs(layers: Sequence[LinearLayer], by_name: Mapping[str, LayerCost]) -> int:
    """MACs of the layers whose products are no bit operations."""
    return sum(
        layer.macs
        for layer in layers
        if layer.name not in by_name or not by_name[layer.name].bit_ops
    )


def _uniform_weight_bits(costs: PlanCosts, kind: str) -> float | None:
    """Nominal bits of the quantized layers of a kind (32: there are none); None if they differ."""
    found = {cost.weight_bits for cost in costs.layers if cost.layer.kind == kind}
    found = found or {FULL_PRECISION_BITS}
    return found.pop() if len(found) == 1 else None


def _bits_by_kind(structure: Structure, costs: PlanCosts) -> dict[str, dict[str, Any]]:
    """Nominal and effective bits of the quantized layers, by kind and of all of them."""
    found = {}
    for kind in ("block", "adaLN", "other", "all"):
        own = [cost for cost in costs.layers if kind in (cost.layer.kind, "all")]
        if not own:
            continue
        weights = [cost.layer.weights for cost in own]
        macs = [cost.layer.macs for cost in own]
        found[kind] = {
            "layers": sum(kind in (layer.kind, "all") for layer in structure.linears),
            "quantized": len(own),
            "weight_bits": _mean([cost.weight_bits for cost in own], weights),
            "effective_weight_bits": _mean([cost.stored_weight_bits for cost in own], weights),
            "activation_bits": _mean([cost.input_bits for cost in own], macs),
            "effective_activation_bits": _mean([cost.stored_input_bits for cost in own], macs),
        }
    return found


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    if len(set(values)) == 1:
        return values[0]  # without a rounding error
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _code_bytes(cost: LayerCost, packing: Packing) -> int:
    layer = cost.layer
    if not cost.is_ternary:
        return math.ceil(layer.weights * cost.weight_bits / 8)
    if packing.name.startswith("2bit/"):  # the kernels' layout: rows in blocks of 128 codes
        return layer.out_features * math.ceil(layer.in_features / 128) * 32
    return math.ceil(layer.weights * packing.bits_per_code / 8)


def _branch_bytes(cost: LayerCost, packing: Packing) -> int:
    size = packing.low_rank_bytes * cost.branch_values
    # int8: a float32 scale per component in either factor.
    return size + (8 * (cost.branch_rank or 0) if packing.low_rank_bytes == 1 else 0)


def _rest_bytes(structure: Structure, costs: PlanCosts, packing: Packing) -> int:
    packed = {f"{cost.layer.name}.weight" for cost in costs.with_codes}
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


def _is_dit_xl_2(model_config: ModelConfig) -> bool:
    return all(getattr(model_config, field) == value for field, value in DIT_XL_2.items())
