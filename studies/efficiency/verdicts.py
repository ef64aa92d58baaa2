"""The paper's factors, judged by what `study efficiency` counted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robuq_bench.statistics.verdicts import Verdict
from studies.efficiency.claims import PAPER

Row = dict[str, Any]
THEORY = 13.2
PEERS = ("torchao-int8", "fp8-rowwise")  # 8 bits too: no baseline that the paper could mean
NEEDS_GPU = "needs a CUDA device"
OTHER_MODEL = "this run is of another model"
_IN_THEORY = f"DiT-XL/2 becomes {THEORY:g}× smaller in theory"
_AS_CHECKPOINT = f"DiT-XL/2 becomes {PAPER['checkpoint size']:g}× smaller as a checkpoint"
_LESS_MEMORY = f"DiT-XL/2 takes {PAPER['GPU memory']:g}× less GPU memory"
_FASTER = f"DiT-XL/2 runs {PAPER['speed']:g}× faster"


def verdicts(is_xl: bool, checkpoints: Sequence[Row], rows: Sequence[Row]) -> list[Verdict]:
    """Theory, checkpoint, memory and speed; all are about DiT-XL/2.

    Args:
        is_xl: whether the run is of that model; of another, nothing is judged.
        checkpoints: of the table of that name.
        rows: of the table `claims`.
    """
    if not is_xl:
        claims = (_IN_THEORY, _AS_CHECKPOINT, _LESS_MEMORY, _FASTER)
        return [_not_judged(claim, OTHER_MODEL) for claim in claims]
    memory = [row for row in rows if row["claim"] == "GPU memory"]
    peaks = [row for row in memory if row["against"].endswith(", peak of a step")]
    return [
        _theory(checkpoints),
        _checkpoint([row for row in rows if row["claim"] == "checkpoint size"]),
        *(_weights(row) for row in memory if row["against"].endswith(", weights alone")),
        *by_baseline(_LESS_MEMORY, peaks),
        *by_baseline(_FASTER, [row for row in rows if row["claim"] == "speed"]),
    ]


def _theory(checkpoints: Sequence[Row]) -> Verdict:
    near = [row for row in checkpoints if row["published"] == THEORY]
    if not near:
        return _not_judged(_IN_THEORY, "no reading of the paper's count at this rank")
    amount = near[0]["size_reduction"]
    # rounded as the paper prints it
    is_met = round(amount, 1) >= THEORY
    note = f"counted as the paper may have: {near[0]['reading']}"
    return _exact(_IN_THEORY, amount, is_met, note)


def _checkpoint(files: Sequence[Row]) -> Verdict:
    best = max(row["factor"] for row in files)
    note = "; ".join(f"{row['factor']:.2f}× as {row['ours']}" for row in files)
    return _exact(_AS_CHECKPOINT, best, best >= PAPER["checkpoint size"], note)


def _weights(row: Row) -> Verdict:
    baseline = row["against"].partition(", ")[0]
    claim = f"The weights of DiT-XL/2 take {row['paper']:g}× less memory than in {baseline}"
    note = "without activations and workspace"
    return _exact(claim, row["factor"], row["factor"] >= row["paper"], note)


def by_baseline(claim: str, rows: Sequence[Row]) -> list[Verdict]:
    """One verdict per baseline that was measured; a single one where none was."""
    measured = [row for row in rows if row["factor"] is not None]
    against = dict.fromkeys(row["against"] for row in rows)
    names = [name for name in against if not name.startswith(PEERS)]
    own = {name: [row for row in measured if row["against"] == name] for name in names}
    found = [_against(claim, name, rows) for name, rows in own.items() if rows]
    return found or [_not_judged(claim, NEEDS_GPU)]


def _against(claim: str, against: str, rows: Sequence[Row]) -> Verdict:
    """Judged on the row that decides: the lowest end, or the highest if even that is below."""

    def end(row: Row, name: str) -> float:
        return float(row["factor"] if row[name] is None else row[name])

    least = min(rows, key=lambda row: end(row, "factor_low"))
    most = max(rows, key=lambda row: end(row, "factor_high"))
    claim = f"{claim} than {against}"
    if any("unstable" in row["verdict"] for row in rows):
        return _verdict(claim, "undecided", least, rows, "unstable times")
    if end(least, "factor_low") >= least["paper"]:
        return _verdict(claim, "holds", least, rows)
    if end(most, "factor_high") < most["paper"]:
        return _verdict(claim, "does not hold", most, rows)
    return _verdict(claim, "undecided", least, rows)


def _verdict(claim: str, word: str, row: Row, rows: Sequence[Row], note: str = "") -> Verdict:
    amounts = [other["factor"] for other in rows]
    spread = f"{min(amounts):.2f}× to {max(amounts):.2f}× over packed variants and batches"
    is_timed = row["factor_low"] is not None
    return Verdict(
        claim=claim,
        subject="DiT-XL/2",
        verdict=word,
        effect=row["factor"],
        effect_name="factor",
        low=row["factor_low"],
        high=row["factor_high"],
        n=row["rounds"] if is_timed else 1,
        n_of="rounds of each" if is_timed else "measured peak",
        test="t interval over rounds" if is_timed else "peak of the allocator",
        p_value=None,
        note="; ".join(filter(None, [f"of {row['ours']}, batch {row['batch']}", spread, note])),
    )


def _exact(claim: str, amount: float, is_met: bool, note: str) -> Verdict:
    return Verdict(
        claim=claim,
        subject="DiT-XL/2",
        verdict="holds" if is_met else "does not hold",
        effect=amount,
        effect_name="factor",
        low=None,
        high=None,
        n=1,
        n_of="exact count",
        test="exact accounting",
        p_value=None,
        note=note,
    )


def _not_judged(claim: str, why: str) -> Verdict:
    return Verdict(
        claim=claim,
        subject="DiT-XL/2",
        verdict="not judged",
        effect=None,
        effect_name="factor",
        low=None,
        high=None,
        n=0,
        n_of="measurements",
        test="none",
        p_value=None,
        note=why,
    )
