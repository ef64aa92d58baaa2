"""What a run of `study efficiency` says of packed models on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robuq_bench.cpu_figures import model_name
from robuq_bench.statistics.verdicts import Verdict

Row = dict[str, Any]
CPU_RULE = (
    "On a CPU a step of a packed model, with the best instruction set of the run, is held against "
    "each baseline for each model: at least twice as fast as fp32 eager, as fast as the others. "
    "All variants took turns in one process; by the paired 95 % t interval over rounds, it holds "
    "where the whole interval of every batch and number of threads reaches the factor, does not "
    "hold where all stay below, and is undecided otherwise. Peak memory of a step, beyond that of "
    "the process, is to be a quarter of fp32 eager’s, by one measured peak of each."
)
OURS = "w1.58a4"
LEAST = {"fp32": 2.0, "fp32-compile": 1.0, "bf16": 1.0, "bf16-compile": 1.0, "int8-dynamic": 1.0}
LEAST_MEMORY = 4.0


@dataclass(frozen=True)
class _Claim:
    """A sentence and what it is of."""

    text: str
    subject: str
    bound: float


def cpu_verdicts(factors: Sequence[Row], memory: Sequence[Row]) -> list[Verdict]:
    """Speed against every baseline and memory against fp32, for every model that was measured.

    Args:
        factors: of the table `cpu_factors`.
        memory: of the table `cpu_memory`.
    """
    found = []
    steps = [row for row in factors if row["scope"] == "step" and row["ours"] == OURS]
    for model in dict.fromkeys(row["model"] for row in steps):
        for base, bound in LEAST.items():
            own = [row for row in steps if (row["model"], row["against"]) == (model, base)]
            name = model_name(model)
            text = f"A step of {name} as W1.58A4 is at least {bound:g}× as fast as {base} on a CPU"
            if own:
                found.append(_speed(_Claim(text, name, bound), own))
    return [*found, *_memory(memory)]


def _speed(claim: _Claim, rows: Sequence[Row]) -> Verdict:
    """Judged on the row that decides: the lowest end, or the highest if even that is below."""
    least = min(rows, key=lambda row: row["factor_low"])
    most = max(rows, key=lambda row: row["factor_high"])
    word, row = "undecided", least
    if least["factor_low"] >= claim.bound:
        word = "holds"
    elif most["factor_high"] < claim.bound:
        word, row = "does not hold", most
    amounts = [other["factor"] for other in rows]
    how = f" with {row['instructions']}" if row["instructions"] else ""
    return Verdict(
        claim=claim.text,
        subject=claim.subject,
        verdict=word,
        effect=row["factor"],
        effect_name="factor",
        low=row["factor_low"],
        high=row["factor_high"],
        n=row["rounds"],
        n_of="rounds in turns",
        test="paired t interval over rounds",
        p_value=None,
        note=f"batch {row['batch']}, threads {row['threads']}{how}; {min(amounts):.2f}× to "
        f"{max(amounts):.2f}× over batches and threads",
    )


def _memory(rows: Sequence[Row]) -> list[Verdict]:
    peaks = {(row["model"], row["variant"]): row for row in rows if row["status"] == "ok"}
    found = []
    for (model, variant), row in peaks.items():
        base = peaks.get((model, "fp32"))
        if variant != OURS or base is None:
            continue
        name, factor = model_name(model), base["peak_bytes"] / row["peak_bytes"]
        found.append(
            Verdict(
                claim=f"A step of {name} as W1.58A4 takes at most 1/{LEAST_MEMORY:g} of the memory "
                "of fp32 on a CPU",
                subject=name,
                verdict="holds" if factor >= LEAST_MEMORY else "does not hold",
                effect=factor,
                effect_name="factor",
                low=None,
                high=None,
                n=1,
                n_of="measured peaks",
                test="peak resident memory",
                p_value=None,
                note=f"batch {row['batch']}, threads {row['threads']}",
            )
        )
    return found
