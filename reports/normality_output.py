"""The second rule of `study normality` beside the first: errors at the output, constant energy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from reports.loading import RunData
from reports.normality_figures import BITS, SIGNS, WORDS, placed
from reports.page import Sheet
from reports.text import fixed, listing, percent, significant
from robuq_bench.normality.names import VERDICT_LIMIT as LIMIT
from robuq_bench.statistics.verdicts import interval_text

_WHAT = (
    "Output error: squared error of a layer’s output, from the quantizer at its input, over the "
    "energy of that output about its mean. Output ratio: over the output error of normal tokens of "
    f"the same variance about the mean token; {LIMIT} is the limit. Constant energy: share of the "
    "input’s energy in the mean token. Centring: times that the output error falls when the mean "
    "of other images’ tokens is subtracted before the transform. Means over layers."
)


def both_rules(run: RunData, judged: pd.DataFrame, subject: str, transform: str) -> Iterator[Sheet]:
    """Words of both rules for every layer type and bit width; none of a run without the second."""
    output = run.table("output")
    if output.empty or "ratio" not in output:
        return
    output = placed(_of(output, subject, transform))
    both = output.merge(
        _of(judged, subject, transform), on=["place", "bits"], suffixes=("", "_own")
    )
    if both.empty:
        return
    constant = run.table("constant")
    constant = placed(constant[constant["layer"].isna() & (constant["subject"] == subject)])
    shares = constant.set_index("place")
    share, low, high = (both["place"].map(shares[c]) for c in ("share", "share_low", "share_high"))
    shown = pd.DataFrame(
        {
            "place": both["place"] + ", " + both["bits"].map(_bits),
            "token rule": both["verdict"],
            "of tokens": both["text"],
            "output rule": both["output_verdict"].fillna("not judged"),
            "of outputs": _texts(both, "ratio", "low", "high", (1.0, LIMIT)),
            "output error": both["error"],
            "error interval": _texts(both, None, "error_low", "error_high"),
            "normal tokens": both["normal_error"],
            "constant energy": share,
            "share interval": [interval_text(*pair) for pair in zip(low, high, strict=True)],
        }
    )
    if "centring_gain" in both:
        shown["centring"] = both["centring_gain"]
        shown["gain interval"] = _texts(both, None, "gain_low", "gain_high", (1.0,))
    yield Sheet(
        shown,
        f"Two rules side by side: {subject}, {WORDS.get(transform, transform)}",
        f"Token rule: mean error over each token’s own variance. {_WHAT}",
        formats={
            "output error": significant,
            "normal tokens": significant,
            "constant energy": percent,
            "centring": "{:.2f}×".format,
        },
        heads={"place": "layer type (width)"},
        small={
            "token rule": "of tokens",
            "output rule": "of outputs",
            "output error": "error interval",
            "constant energy": "share interval",
        }
        | ({"centring": "gain interval"} if "centring" in shown else {}),
        kind="verdicts dense",
    )


def disagreement(judged: pd.DataFrame, subject: str, transform: str = SIGNS) -> str:
    """Where the rules say different words, in a sentence; empty for a run without the second."""
    if "output_verdict" not in judged:
        return ""
    own = _of(judged, subject, transform).dropna(subset=["output_verdict"])
    if own.empty:
        return ""
    where = f"{subject}, {WORDS.get(transform, transform)}"
    differs = own[own["verdict"] != own["output_verdict"]]
    if differs.empty:
        return f"Both rules give the same word for all {len(own)} of {where}."
    pairs = []
    for (token, output), rows in differs.groupby(["verdict", "output_verdict"], sort=False):
        by_bits = rows.groupby("bits")["place"].agg(list)
        places = "; ".join(f"{listing(names)} at {_bits(bits)}" for bits, names in by_bits.items())
        pairs.append(f"tokens “{token}” but output “{output}”: {places}")
    return f"The rules disagree for {len(differs)} of {len(own)} of {where}: {'. '.join(pairs)}."


def by_model(run: RunData, subjects: Sequence[str]) -> Iterator[Sheet]:
    """Constant energy and output errors of every model, layer type by layer type."""
    output, constant = run.table("output"), run.table("constant")
    if output.empty or "ratio" not in output:
        return
    at = placed(output[(output["bits"] == BITS) & (output["transform"] == SIGNS)])
    shares = placed(constant[constant["layer"].isna()])
    for frame, column, what, text in (
        (shares, "share", "Share of constant energy", percent),
        (at, "ratio", f"Output ratio, {WORDS[SIGNS]}, {_bits(BITS)}", _two),
        (at, "centring_gain", f"Gain by static centring, {WORDS[SIGNS]}, {_bits(BITS)}", _two),
    ):
        if column not in frame:
            continue
        table = frame.pivot_table(column, "place", "subject", sort=False)
        yield Sheet(
            table.reindex(columns=list(subjects)).reset_index(),
            f"{what} by model",
            formats=dict.fromkeys(subjects, text),
            heads={"place": "layer type"},
        )


def matrices(judged: pd.DataFrame, subject: str) -> str:
    """Which plain Hadamard matrices were used, and the range over equivalent ones."""
    if "matrix_draws" not in judged:
        return "these are numbers of one construction per width"
    own = judged[(judged["subject"] == subject) & (judged["bits"] == BITS)]
    own = own.dropna(subset=["matrix_draws"])
    ranges = [
        f"{row['place']} {_two(row['ratio'])}, range {_two(row['draws_min'])} to "
        f"{_two(row['draws_max'])}"
        for row in own.to_dict("records")
    ]
    names = listing(dict.fromkeys(own["matrix"]))
    return (
        f"these are numbers of {names}. Error ratio at {_bits(BITS)} of that matrix, and over "
        f"{int(own['matrix_draws'].max())} with it that have permuted rows and another column "
        f"constant: {'; '.join(ranges)}"
    )


def _of(frame: pd.DataFrame, subject: str, transform: str) -> pd.DataFrame:
    return frame[(frame["subject"] == subject) & (frame["transform"] == transform)]


def _texts(
    frame: pd.DataFrame, name: str | None, low: str, high: str, limits: tuple[float, ...] = (0.0,)
) -> list[str | None]:
    """Intervals, with their estimate in front where it is named; None where there is none."""
    return [
        None
        if pd.isna(row[low])
        else (f"{significant(row[name])} " if name else "")
        + interval_text(row[low], row[high], limits)
        for row in frame.to_dict("records")
    ]


def _two(value: float) -> str:
    return fixed(value, 2)


def _bits(bits: object) -> str:
    return f"{bits} {'bit' if bits == 1 else 'bits'}"
