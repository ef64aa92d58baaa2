"""The paper's factors beside those of `study efficiency`, one row per baseline."""

from __future__ import annotations

from typing import Any

from robuq_bench.measuring.statistics import Timing, compare, speedup_interval
from studies.efficiency.variants import Variant, variant_of

Item = dict[str, Any]
PAPER = {"checkpoint size": 15.2, "GPU memory": 7.1, "speed": 3.5}
CHECKPOINTS = ("base3/fp32/fp32", "base3/fp16/fp16", "2bit/fp16/fp16", "2bit/fp32/fp32")


def claims(
    options: Any,
    checkpoints: list[dict[str, Any]],
    weights: list[dict[str, Any]],
    modelled: list[dict[str, Any]],
    items: list[Item],
) -> list[dict[str, Any]]:
    """Each published factor beside ours, one row per baseline; `factor` is None where not run."""
    rows: list[dict[str, Any]] = []

    def add(
        claim: str, ours: str, against: str, factor: float | None, basis: str, **rest: Any
    ) -> None:
        row = {"claim": claim, "paper": PAPER[claim], "ours": ours, "against": against}
        row |= {"batch": rest.pop("batch", ""), "factor": factor}
        row |= {"factor_low": None, "factor_high": None, "basis": basis}
        row |= {"verdict": "", "modelled_factor": "", "rounds": "", **rest}
        rows.append(row)

    for row in checkpoints:
        if row["packing"] in CHECKPOINTS:
            add("checkpoint size", row["packing"], "fp32 file", row["size_reduction"], "exact")
    packed = [variant_of(name) for name in options.variants if variant_of(name).plan]
    baselines = [variant_of(name) for name in options.variants if not variant_of(name).plan]
    bytes_of = {row["variant"]: row["weight_bytes"] for row in weights}
    for ours in packed[:1]:  # bits of activations change no weight
        for base in baselines:
            if base.compiled or base.name == "tf32":
                continue  # the same weights
            ratio = bytes_of[base.name] / bytes_of[ours.name]
            add("GPU memory", ours.name, f"{base.name}, weights alone", ratio, "exact")
    found = {(i["measured"], i["variant"], i["batch"]): i for i in items}
    for ours in packed:
        for base in baselines:
            for batch in options.batches:
                pair = [found.get(("step", v.name, batch)) for v in (ours, base)]
                peaks = [None if i is None else i.get("peak_bytes") for i in pair]
                add(
                    "GPU memory",
                    ours.name,
                    f"{base.name}, peak of a step",
                    None if None in peaks else peaks[1] / peaks[0],  # type: ignore[operator]
                    "not run" if None in peaks else "measured",
                    batch=batch,
                )
    for kind in ("step", "sampling"):
        for ours in packed:
            for base in baselines:
                for index, batch in enumerate(options.batches):
                    if kind == "sampling" and batch not in options.sampling_batches:
                        continue
                    pair = [found.get((kind, v.name, batch)) for v in (ours, base)]
                    speed = speed_factor(*pair)
                    model = _modelled(base, modelled[index]) if kind == "step" else ""
                    add(
                        "speed",
                        ours.name,
                        f"{base.name}, {kind}",
                        basis="measured" if speed else "not run",
                        batch=batch,
                        modelled_factor=model,
                        **(speed or {"factor": None}),
                    )
    return rows


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is printed: every factor, and of those not run one a claim, or all that have a model.

    Bits of activations change no modelled time, so the model is shown for the first packed variant.
    All rows are in `tables/claims.csv`.
    """
    found, silent = [], set(PAPER)
    first = next((row["ours"] for row in rows if row["claim"] == "speed"), None)
    for row in rows:
        is_modelled = row["modelled_factor"] != "" and row["ours"] == first
        is_silent = row["claim"] in silent and row["factor"] is None
        if row["factor"] is not None or is_modelled or is_silent:
            hidden = ("factor_low", "factor_high", "rounds")
            found.append({name: cell for name, cell in row.items() if name not in hidden})
        if row["factor"] is None or row["basis"] == "measured":
            silent.discard(row["claim"])
    return found


def speed_factor(ours: Item | None, base: Item | None) -> dict[str, Any]:
    """Columns of a speed-up with its interval and verdict; none where an item has no time."""
    if ours is None or base is None or "rounds_s" not in ours or "rounds_s" not in base:
        return {}
    mine, theirs = (
        Timing(tuple(tuple(r) for r in item["rounds_s"]), item["method"]) for item in (ours, base)
    )
    result = compare(mine.samples_s, theirs.samples_s)
    low, high = speedup_interval(mine, theirs, interleaved=False)
    unstable = "unstable" in (ours["stability"], base["stability"])
    return {
        "factor": result.speedup,
        "factor_low": low,
        "factor_high": high,
        "rounds": min(len(mine.rounds_s), len(theirs.rounds_s)),
        "verdict": f"{result.verdict}{', unstable' if unstable else ''}",
    }


def _modelled(base: Variant, row: dict[str, Any]) -> float | str:
    """The model's factor over a compiled baseline: eager code is slower, fewer bits buy nothing."""
    columns = {"bf16-graph": "bf16", "tf32": "tf32", "fp32": "fp32"}
    name = columns.get(base.name)
    return "" if name is None else float(row[f"ratio_to_{name}"])
