"""What a plan makes of every linear layer of a workload's model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from robuq_bench.accounting.layer_costs import LayerCost, plan_costs
from robuq_bench.accounting.structure import allocatable, dit_selected, dit_structure
from robuq_bench.errors import ConfigError
from robuq_bench.quantization.convert import warn_of_idle_rules

if TYPE_CHECKING:
    from robuq_bench.config import Plan, Workload
    from robuq_bench.config.workload import ModelConfig
    from robuq_bench.quantization.selection import Selected


def layer_rows(
    model_config: ModelConfig, plan: Plan, bits_by_layer: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """One row for each linear layer, in module order.

    `kept` says why a layer stays in full precision, None of one that does not. `slots` are its
    methods as the plan has them, by slot. Bits are nominal and effective (see `account`), 32 for an
    empty slot, and None where an allocation will decide them; `choices` are then what it chooses
    from.

    Args:
        bits_by_layer: what the plan allocates, as `account` takes it; None leaves it open.

    Raises:
        UsageError, ConfigError: as `account`.
    """
    structure = dit_structure(model_config, plan)
    undecided: set[str] = set()
    of = "activation" if plan.bits is None else plan.bits.of
    decided = plan
    if plan.bits is not None and bits_by_layer is None:
        undecided = {layer.name for layer in allocatable(structure, plan.bits.of)}
        decided = plan.model_copy(update={"bits": None})
    costs = {cost.layer.name: cost for cost in plan_costs(structure, decided, bits_by_layer).layers}
    rows = []
    for name, selected in dit_selected(model_config, plan).items():
        row = _row(selected, costs.get(name))
        if name in undecided and plan.bits is not None:
            row |= {f"{of}_bits": None, f"effective_{of}_bits": None}
            row["choices"] = list(plan.bits.choices)
        rows.append(row)
    return rows


def check_plan(plan: Plan, workload: Workload) -> None:
    """Refuse a plan that does not fit a workload's model, or has no account.

    Raises:
        ConfigError, UsageError: it quantizes no layer, or a method cannot serve one or does not say
            what it costs.
    """
    if plan.is_full_precision:
        return
    selected = dit_selected(workload.model, plan)
    if not any(layer.rule for layer in selected.values()):
        raise ConfigError(
            f"plan {plan.name!r} quantizes no layer of workload {workload.name!r}; see "
            f"`plans {plan.name} --on {workload.name} --layers`"
        )
    warn_of_idle_rules(plan, selected)
    # At the bits of its rules, because those of an allocation need not be known yet.
    decided = plan.model_copy(update={"bits": None})
    plan_costs(dit_structure(workload.model, decided), decided, None)


def _row(selected: Selected, cost: LayerCost | None) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": selected.name, "kind": selected.kind}
    if cost is None or selected.rule is None:
        return row | {"rule": None, "kept": selected.reason, "slots": {}}
    methods = selected.rule.slots()
    return row | {
        "rule": selected.rule.name,
        "fixed_bits": selected.rule.fixed_bits,
        "kept": None,
        "slots": {slot: method.model_dump(mode="json") for slot, method in methods.items()},
        "branch_rank": cost.branch_rank,
        "weight_bits": cost.weight_bits,
        "effective_weight_bits": cost.stored_weight_bits,
        "activation_bits": cost.input_bits,
        "effective_activation_bits": cost.stored_input_bits,
        "choices": None,
    }
