"""`plans NAME --layers`: what a plan makes of every layer of a workload's model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robuq_bench.cli import console

if TYPE_CHECKING:
    from robuq_bench.config import Plan, Workload
    from robuq_bench.config.workload import ModelConfig
    from robuq_bench.methods import Method


def show_layers(plan: Plan, workload: Workload, as_json: bool) -> None:
    """Print a row for each linear layer, in module order, and how many are quantized."""
    from robuq_bench.accounting.layers import layer_rows

    rows = layer_rows(workload.model, plan, bits_from_file(plan, workload.model))
    if as_json:
        console.print_json({"plan": plan.name, "workload": workload.name, "layers": rows})
        return
    methods = {rule.name: rule.slots() for rule in plan.layers}
    table = [_cells(row, methods.get(row["rule"], {})) for row in rows]
    used = {column for line in table for column, value in line.items() if value is not None}
    console.print_table(
        [{key: value for key, value in line.items() if key in used} for line in table], missing=""
    )
    quantized = sum(row["kept"] is None for row in rows)
    print(f"{quantized} of {len(rows)} linear layers are quantized", flush=True)
    if plan.bits is not None and plan.bits.mean is not None:
        cost = {"macs": "MACs"}.get(plan.bits.cost, plan.bits.cost)
        print(
            f"bits of {plan.bits.of}s: {plan.bits.mean:g} on average over {cost}, by "
            f"{plan.bits.metric} and {plan.bits.solver}; a run decides who gets how many",
            flush=True,
        )


def bits_from_file(plan: Plan, model_config: ModelConfig) -> dict[str, int] | None:
    """The bits that a plan reads from a file; None for one that reads none."""
    if plan.bits is None or plan.bits.path is None:
        return None
    from robuq_bench.accounting.structure import allocatable, dit_structure
    from robuq_bench.config import load_allocation_file

    layers = allocatable(dit_structure(model_config, plan), plan.bits.of)
    return load_allocation_file(plan.bits, [layer.name for layer in layers])


def method_text(method: Method) -> str:
    """A method with the parameters that the plan gives it, less its bits: "svd(rank=8)"."""
    values = method.model_dump(exclude_unset=True, exclude={"method", "sha256", "bits"})
    texts = {key: str(v).lower() if isinstance(v, bool) else v for key, v in values.items()}
    inside = ", ".join(f"{key}={text}" for key, text in texts.items())
    return f"{method.method}({inside})" if inside else method.method


def _cells(row: dict[str, Any], methods: dict[str, Method]) -> dict[str, Any]:
    from robuq_bench.methods import SLOTS

    cells: dict[str, Any] = {key: row[key] for key in ("layer", "kind", "rule")}
    for slot in SLOTS:
        cells[slot] = method_text(methods[slot]) if slot in methods else None
        if slot in ("weight", "activation"):
            cells[f"{slot} bits (effective)"] = _bits_text(row, slot)
        if slot == "branch":
            cells["branch rank"] = row.get("branch_rank") or None
    return cells | {"kept because it": row["kept"]}


def _bits_text(row: dict[str, Any], of: str) -> str | None:
    if row["kept"] is not None:
        return None
    bits, effective = row[f"{of}_bits"], row[f"effective_{of}_bits"]
    if bits is None:  # an allocation will say
        return f"{row['choices'][0]} to {row['choices'][-1]}"
    return f"{bits:.4g} ({effective:.4g})"
