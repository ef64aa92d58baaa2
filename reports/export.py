"""The tables as files beside the report: tidy CSV at full precision, and LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from reports.aggregate import Group
from reports.claims import Claim
from reports.loading import RunData
from reports.normality.data import LIMIT, NormalityRun, ratio_text, words
from reports.settings import allocated, flatten
from reports.study_tables import StudyRun
from reports.tables import Cell, Table
from reports.text import mean_and_spread, plain
from robuq_bench.files import atomic_write_text

_COLUMNS = {
    "metrics": "workload sampler sampling_steps cfg_scale num_samples plan subject seed "
    "seed_range metric value is_rank_deficient run",
    "summary": "workload num_samples plan metric mean min max values training_seeds",
    "allocation": "run plan seed layer activation_bits macs",
    "sensitivity": "run plan seed layer activation_bits mse",
    "training": "run plan seed step phase loss distillation_loss denoising_loss learning_rate "
    "grad_norm",
    "accounting": "run plan seed quantity value",
    "claims": "protocol claim verdict evidence",
}

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)


def write_tables(
    output: Path,
    groups: Sequence[Group],
    runs: Sequence[RunData],
    claims: Iterable[tuple[str, Claim]],
) -> list[Path]:
    """Write `<stem>-<table>.csv` for every table and `<stem>-summary.tex`; return their paths.

    A table without rows is written with its header alone, so that no older file stays behind.

    Raises:
        RobuqError: the folder cannot be written.
    """
    rows: dict[str, list[dict[str, Any]]] = {
        "metrics": [line for group in groups for line in _metrics(group)],
        "summary": [line for group in groups for line in _summary(group)],
        "allocation": [line for run in runs for line in _allocation(run)],
        "sensitivity": [line for run in runs for line in _records(run, "sensitivity")],
        "training": [line for run in runs for line in _records(run, "train")],
        "accounting": [line for run in runs for line in _accounting(run)],
        "claims": [
            {
                "protocol": protocol,
                "claim": claim.claim,
                "verdict": claim.verdict,
                "evidence": plain(claim.evidence),
            }
            for protocol, claim in claims
        ],
    }
    paths = []
    for name, columns in _COLUMNS.items():
        # A column that few sets of runs need stands in no other's table.
        extra = ["weight_bits"] * any("weight_bits" in line for line in rows[name])
        frame = pd.DataFrame(rows[name], columns=[*columns.split(), *extra])
        path = output.with_name(f"{output.stem}-{name}.csv")
        paths.append(atomic_write_text(path, frame.to_csv(index=False, lineterminator="\n")))
    path = output.with_name(f"{output.stem}-summary.tex")
    return [*paths, atomic_write_text(path, latex(groups))]


def write_normality(output: Path, studies: Sequence[NormalityRun]) -> list[Path]:
    """Write `<stem>-normality-types.csv`, `-verdicts.csv` and `<stem>-normality.tex`.

    The CSV files hold the runs' own tables with the run before them. Without a run nothing is
    written, but an older file is emptied.

    Raises:
        RobuqError: the folder cannot be written.
    """
    paths = [write_run_table(output, "normality", name, studies) for name in ("types", "verdicts")]
    path = output.with_name(f"{output.stem}-normality.tex")
    if studies or path.exists():
        paths.append(atomic_write_text(path, normality_latex(studies)))
    return [path for path in paths if path is not None]


def write_run_table(
    output: Path, study: str, name: str, runs: Sequence[StudyRun | NormalityRun]
) -> Path | None:
    """Write `<stem>-<study>-<name>.csv`: the runs' own table with the run before it.

    Without a run nothing is written, but an older file is emptied.

    Raises:
        RobuqError: the folder cannot be written.
    """
    path = output.with_name(f"{output.stem}-{study}-{name}.csv")
    if not runs and not path.exists():
        return None
    rows = [{"run": found.run.id, **row} for found in runs for row in found.tables[name]]
    return atomic_write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def write_tex(output: Path, study: str, tables: Sequence[Table]) -> Path | None:
    """Write `<stem>-<study>.tex`: tables of the report as printed, in booktabs.

    Without a table nothing is written, but an older file is emptied.

    Raises:
        RobuqError: the folder cannot be written.
    """
    path = output.with_name(f"{output.stem}-{study}.tex")
    if not tables and not path.exists():
        return None
    text = "\n".join(_table_latex(table) for table in tables) or f"% no finished {study} run\n"
    return atomic_write_text(path, text)


def _table_latex(table: Table) -> str:
    frame = pd.DataFrame(
        [[_cell_text(cell) for cell in row] for row in table.rows],
        columns=[column.label for column in table.columns],
    )
    styler = frame.style.hide(axis="index").format(escape="latex")
    return styler.format_index(escape="latex", axis=1).to_latex(
        hrules=True,
        column_format="".join("r" if column.is_number else "l" for column in table.columns),
        caption=_escape_latex(f"{table.caption}. {table.note}"),
    )


def _cell_text(cell: Cell) -> str:
    return plain(cell.parts)


def normality_latex(studies: Sequence[NormalityRun]) -> str:
    """One booktabs table per run and model: error ratio by layer type, transform and bits."""
    tables = []
    for study in studies:
        for subject in study.subjects:
            lines = []
            for place in study.places:
                for transform in study.transforms:
                    found = [study.judgement(subject, place, transform, b) for b in study.bits]
                    if any(found):
                        ratios = [
                            "--" if j is None else f"{ratio_text(j.ratio)} [{ratio_text(j.high)}]"
                            for j in found
                        ]
                        lines.append([f"{place[0]} ({place[1]})", words(transform), *ratios])
            columns = ["layer type (width)", "transform", *(f"{b}-bit" for b in study.bits)]
            styler = pd.DataFrame(lines, columns=columns).style.hide(axis="index")
            caption = _escape_latex(
                f"{subject} of {study.title}: mean error ratio to a normal token [upper end of its "
                f"95 % interval], normal enough below {LIMIT}. Run {study.run.id}."
            )
            tables.append(
                styler.format(escape="latex").to_latex(
                    hrules=True, column_format="ll" + "r" * len(study.bits), caption=caption
                )
            )
    return "\n".join(tables) if tables else "% no finished normality run\n"


def summary_frame(group: Group) -> pd.DataFrame:
    """Plans × metrics as printed; missing cells say "not run"."""
    return pd.DataFrame(
        [
            [mean_and_spread(metric, row.summary(metric)) for metric in group.metrics]
            for row in group.all_rows
        ],
        index=pd.Index([row.label for row in group.all_rows], name="plan"),
        columns=group.metrics,
    )


def latex(groups: Sequence[Group]) -> str:
    """One booktabs table per protocol; needs \\usepackage{booktabs}."""
    tables = []
    for group in groups:
        frame = summary_frame(group).reset_index()
        styler = frame.style.hide(axis="index").format(escape="latex")
        styler = styler.format_index(escape="latex", axis=1)
        caption = _escape_latex(f"{group.title}: mean [min–max]. {group.protocol}.")
        tables.append(
            styler.to_latex(
                hrules=True, column_format="l" + "r" * len(group.metrics), caption=caption
            )
        )
    return "\n".join(tables) if tables else "% no finished train-and-eval run\n"


def _escape_latex(text: str) -> str:
    return text.translate(_LATEX)


def _metrics(group: Group) -> Iterable[dict[str, Any]]:
    evaluation = group.evaluation
    for row in group.all_rows:
        is_teacher = row is group.teacher
        for metric in group.metrics:
            for value in row.values.get(metric, []):
                yield {
                    "workload": group.title,
                    "sampler": evaluation.get("sampler"),
                    "sampling_steps": evaluation.get("sampling_steps"),
                    "cfg_scale": evaluation.get("cfg_scale"),
                    "num_samples": group.num_samples,
                    "plan": row.label,
                    "subject": "teacher" if is_teacher else "student",
                    "seed": "" if is_teacher else value.run.seed,
                    "seed_range": "" if value.seed_range is None else value.seed_range,
                    "metric": metric,
                    "value": value.value,
                    "is_rank_deficient": value.is_rank_deficient,
                    "run": value.run.id,
                }


def _summary(group: Group) -> Iterable[dict[str, Any]]:
    for row in group.all_rows:
        for metric in group.metrics:
            summary = row.summary(metric)
            numbers: Mapping[str, Any] = {"mean": "not run", "values": 0, "training_seeds": 0}
            if summary is not None:
                numbers = {
                    "mean": summary.mean,
                    "min": summary.low,
                    "max": summary.high,
                    "values": summary.count,
                    "training_seeds": 0 if row is group.teacher else summary.seeds,
                }
            yield {
                "workload": group.title,
                "num_samples": group.num_samples,
                "plan": row.label,
                "metric": metric,
                **numbers,
            }


def _identity(run: RunData) -> dict[str, Any]:
    return {"run": run.id, "plan": run.plan_name, "seed": run.seed}


def _records(run: RunData, kind: str) -> Iterable[dict[str, Any]]:
    for record in run.of_kind(kind):
        fields = {k: v for k, v in record.items() if k not in ("key", "kind", "bits")}
        if "bits" in record:
            fields[f"{allocated(run.plan)}_bits"] = record["bits"]
        yield {**_identity(run), **fields}


def _allocation(run: RunData) -> Iterable[dict[str, Any]]:
    record = run.first("allocation")
    macs = record.get("macs", {})
    for layer, bits in record.get("bits_by_layer", {}).items():
        yield {
            **_identity(run),
            "layer": layer,
            f"{allocated(run.plan)}_bits": bits,
            "macs": macs.get(layer, ""),
        }


def _accounting(run: RunData) -> Iterable[dict[str, Any]]:
    record = {k: v for k, v in run.first("accounting").items() if k not in ("key", "kind")}
    for scheme in record.pop("packing_table", []):
        record[f"packing.{scheme.get('packing')}.total_bytes"] = scheme.get("total_bytes")
    for quantity, value in flatten(record).items():
        if isinstance(value, int | float | str):
            yield {**_identity(run), "quantity": quantity, "value": value}
