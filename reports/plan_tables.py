"""What each plan does and costs, and how long its runs took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from reports.loading import RunData
from reports.page import Format, Sheet
from reports.protocols import Group
from reports.provenance import hardware
from reports.settings import FULL_PRECISION, recipe, section
from reports.text import bytes_text, count_text, seconds_text, significant, times

_SMALL = ("weight_bits", "mean_activation_bits", "compute_reduction", "packed_bytes")


def plans_sheet(group: Group) -> Sheet:
    """What each plan does, read from its settings; parts that few have only where one does."""
    parts = pd.DataFrame([recipe(row.plan) for row in group.rows])
    absent = {"scaling": "none", "other layers": FULL_PRECISION}
    unused = [name for name, text in absent.items() if (parts[name] == text).all()]
    parts = parts.drop(columns=unused)
    steps = ["not recorded" if row.qat_steps is None else str(row.qat_steps) for row in group.rows]
    parts["QAT steps"] = [
        "0 (PTQ)" if row.is_ptq else text for row, text in zip(group.rows, steps, strict=True)
    ]
    caption = f"What each plan on {group.title} does"
    note = "Parameters of a method are shown where they are not its defaults."
    return _with_plans(group, parts, caption, note, kind="dense")


def _with_plans(group: Group, frame: pd.DataFrame, caption: str, note: str, **how: Any) -> Sheet:
    """A table with one line per plan."""
    frame.insert(0, "plan", [row.name for row in group.rows])
    frame["notes"] = [row.notes for row in group.rows]
    small = {"plan": "notes", **how.pop("small", {})}
    return Sheet(frame, caption, note, small=small, **how)


def cost_sheet(group: Group) -> Sheet:
    """Bits, operations and bytes of each plan, with reductions against full precision."""
    shown: dict[str, tuple[str, Format, str]] = {
        "weight_bits": ("weight bits", significant, "with scales below"),
        "mean_activation_bits": (
            "activation bits",
            lambda value: significant(value, 4),
            "mean, weighted by MACs; with scales below",
        ),
        "bit_ops": ("BitOPs", count_text, "per image and step"),
        "effective_flops": ("effective FLOPs", count_text, "BitOPs / 64 + full-precision MACs"),
        "compute_reduction": ("less compute", times, "with the rotation’s additions below"),
        "packed_bytes": ("packed size", bytes_text, "packing below"),
        "size_reduction": ("smaller", times, "than FP32"),
    }
    lines = []
    for row in group.rows:
        run = next((run for run in row.runs if run.first("accounting")), None)
        record = run.first("accounting") if run else {}
        blocks = section(section(record, "bits_by_kind"), "block")  # not in older records
        # Where layers differ there are no bits of all, but a mean.
        found = {**blocks, **{key: v for key, v in record.items() if v is not None}}
        line = {name: found.get(name) for name in shown}
        small = {
            "weight_bits": _text(blocks.get("effective_weight_bits"), significant),
            "mean_activation_bits": _text(blocks.get("effective_activation_bits"), significant),
            "compute_reduction": _text(record.get("compute_reduction_with_rotation"), times),
            "packed_bytes": str(record.get("packing", "")),
        }
        line |= {f"{name} small": text for name, text in small.items()}
        lines.append(line | {"href": run.href if run else None})
    frame = pd.DataFrame(lines, columns=[*shown, *(f"{n} small" for n in _SMALL), "href"])
    frame = frame.astype(dict.fromkeys(shown, float))
    return _with_plans(
        group,
        frame,
        f"What each plan costs on {group.title}",
        "The paper’s 13.2× (theory) and 15.2× (checkpoint) are for DiT-XL/2, where the layers kept "
        "in full precision weigh less than in a small model. Effective FLOPs count one MAC as one.",
        formats={name: how for name, (_, how, _) in shown.items()},
        heads={name: head for name, (head, _, _) in shown.items()},
        hints={name: hint for name, (_, _, hint) in shown.items()},
        links=dict.fromkeys(shown, "href"),
        small={name: f"{name} small" for name in _SMALL},
    )


def _text(value: object, render: Callable[[float], str]) -> str:
    return render(float(value)) if isinstance(value, int | float) else ""


def timing_sheet(runs: Sequence[RunData]) -> Sheet | None:
    """Seconds of each part of a run; machines differ, so each line names its own."""
    lines = [
        {
            "run": f"{run.plan_name} seed {run.seed}",
            **{k.removesuffix("_s"): v for k, v in run.first("timing").items() if k.endswith("_s")},
            "sessions": len(run.manifest.get("sessions", [])),
            "machine": hardware(run.provenance),
            "threads": str(run.provenance.get("threads", "not recorded")),
            "href": run.href,
        }
        for run in runs
        if run.first("timing")
    ]
    if not lines:
        return None
    frame = pd.DataFrame(lines)
    others = ("run", "total", "sessions", "machine", "threads", "href")
    names = [str(name) for name in frame if name not in others] + ["total"] * ("total" in frame)
    return Sheet(
        frame[["run", *names, "sessions", "machine", "threads", "href"]],
        "Time",
        "Of a run that was continued after a stop, `total` covers its last session only.",
        formats=dict.fromkeys(names, seconds_text),
        links={"run": "href"},
        kind="dense",
    )
