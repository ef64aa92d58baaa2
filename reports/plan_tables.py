"""What each plan does and costs, and how long its runs took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from reports.loading import RunData
from reports.page import Format, Sheet
from reports.protocols import Group
from reports.provenance import hardware
from reports.settings import FULL_PRECISION, recipes, section
from reports.text import bytes_text, count_text, seconds_text, significant, times

# Field of the accounting record -> head, format and hint of its column.
_COSTS: Mapping[str, tuple[str, Format, str]] = {
    "weight_bits": ("weight bits", significant, "with scales below"),
    "mean_activation_bits": (
        *("activation bits", lambda value: significant(value, 4)),
        "mean, weighted by MACs; with scales below",
    ),
    "low_rank_rank": ("rank", significant, "of the low-rank branches in this model"),
    "bit_ops": ("BitOPs", count_text, "per image and step"),
    "effective_flops": ("effective FLOPs", count_text, "BitOPs / 64 + full-precision MACs"),
    "compute_reduction": ("less compute", times, "with the rotation’s additions below"),
    "packed_bytes": ("packed size", bytes_text, "packing below"),
    "size_reduction": ("smaller", times, "than FP32"),
}


def plans_sheet(group: Group) -> Sheet:
    """What each plan does, read from its settings; parts that few have only where one does."""
    parts = pd.DataFrame(recipes([row.plan for row in group.rows]))
    absent = {"centring": "none", "scaling": "none", "other layers": FULL_PRECISION}
    parts = parts.drop(columns=[name for name in absent if (parts[name] == absent[name]).all()])
    parts["QAT steps"] = [
        "0 (PTQ)"
        if row.is_ptq
        else "not recorded"
        if row.qat_steps is None
        else f"{row.qat_steps}{row.warmup_text}"
        for row in group.rows
    ]
    note = (
        "Parameters of a method are shown where plans differ in them; each run’s config, under "
        "Provenance, has all."
    )
    return _with_plans(group, parts, f"What each plan on {group.title} does", note, kind="dense")


def cost_sheet(group: Group) -> Sheet:
    """Bits, operations and bytes of each plan, with reductions against full precision."""
    lines = []
    for row in group.rows:
        run = next((run for run in row.runs if run.first("accounting")), None)
        record = run.first("accounting") if run else {}
        blocks = section(section(record, "bits_by_kind"), "block")  # not in older records
        # Where layers differ there are no bits of all, but a mean.
        known = {key: value for key, value in record.items() if value is not None}
        lines.append({**blocks, **known, "href": run.href if run else None})
    small = {
        "weight_bits": "effective_weight_bits",
        "mean_activation_bits": "effective_activation_bits",
        "compute_reduction": "compute_reduction_with_rotation",
        "packed_bytes": "packing",
    }
    frame = pd.DataFrame(lines, columns=[*_COSTS, *small.values(), "href"])
    frame = frame.astype(dict.fromkeys(_COSTS, float))
    for name in [*small.values()][:3]:
        how = times if name.startswith("compute") else significant
        frame[name] = [how(value) if value == value else "" for value in frame[name].astype(float)]
    return _with_plans(
        group,
        frame,
        f"What each plan costs on {group.title}",
        "The paper’s 13.2× (theory) and 15.2× (checkpoint) are for DiT-XL/2, where the layers kept "
        "in full precision weigh less than in a small model. Effective FLOPs count one MAC as one.",
        formats={name: how for name, (_, how, _) in _COSTS.items()},
        heads={name: head for name, (head, _, _) in _COSTS.items()},
        hints={name: hint for name, (_, _, hint) in _COSTS.items()},
        links=dict.fromkeys(_COSTS, "href"),
        small=small,
    )


def _with_plans(group: Group, frame: pd.DataFrame, caption: str, note: str, **how: Any) -> Sheet:
    """A table with one line per plan."""
    frame.insert(0, "plan", [row.name for row in group.rows])
    frame["notes"] = [row.notes for row in group.rows]
    return Sheet(frame, caption, note, small={"plan": "notes", **how.pop("small", {})}, **how)


def timing_sheet(runs: Sequence[RunData]) -> Sheet | None:
    """Seconds of each part of a run; machines differ, so each line names its own."""
    timed = [run for run in runs if run.first("timing")]
    if not timed:
        return None
    seconds = pd.DataFrame([run.first("timing") for run in timed]).filter(regex="_s$")
    seconds = seconds.rename(columns=lambda name: name.removesuffix("_s"))
    if "total" in seconds:
        seconds["total"] = seconds.pop("total")  # last
    formats = dict.fromkeys(map(str, seconds), seconds_text)
    seconds.insert(0, "run", [f"{run.plan_name} seed {run.seed}" for run in timed])
    frame = seconds.assign(
        sessions=[len(run.manifest.get("sessions", [])) for run in timed],
        machine=[hardware(run.provenance) for run in timed],
        threads=[str(run.provenance.get("threads", "not recorded")) for run in timed],
        href=[run.href for run in timed],
    )
    return Sheet(
        frame,
        "Time",
        "Of a run that was continued after a stop, `total` covers its last session only, the parts "
        "and CPU seconds all of them. What a warm-up and its sensitivities took is the price of "
        "bits that a plan allocates.",
        formats=formats,
        links={"run": "href"},
        kind="dense",
    )
