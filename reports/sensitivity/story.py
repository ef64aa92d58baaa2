"""What a sensitivity run says, in words and as claims; every sentence follows from its tables."""

from __future__ import annotations

import statistics

from reports.claims import FAILS, HOLDS, UNDECIDED, Claim
from reports.normality.data import bits_text
from reports.study_tables import Row, StudyRun, group, span, three, two, value
from reports.text import Phrase, joined, listing, plural

RULE = (
    "“PTQ sensitivities mislead” holds when the gain of Spearman’s ρ from measuring after the last "
    "K steps instead of before training has a 95 % interval above 0, with the increase of the "
    "distillation loss as the truth; it does not hold when the interval lies below 0.05, and is "
    "undecided otherwise, and where seeds agree on the truth with a mean ρ below 0.3, which was "
    "added after the first run. The rest of the rule was fixed before any run was read."
)
_VERBS = {
    HOLDS: "misrank layers",
    FAILS: "rank layers about as well as those after it",
    UNDECIDED: "may or may not misrank layers (undecided)",
}
METRIC_WORDS = {
    "epsilon_mse": "change of the noise prediction",
    "epsilon_mse_teacher": "increase of the error against the teacher",
    "output_mse": "error of the layer’s own output",
    "output_nsr": "noise-to-signal of the layer’s own output",
    "fisher": "Fisher",
    "hessian_trace": "Hessian trace",
    "higgs": "HIGGS linearity",
}


def metric_words(metric: str) -> str:
    return METRIC_WORDS.get(metric, metric.replace("_", " "))


def after(steps: str) -> str:
    return "before training" if steps == "0" else f"after {plural(int(steps), 'step')}"


def width_words(bits: str) -> str:
    return "all bit widths" if bits == "all" else bits_text([int(bits)])


def usual_bits(study: StudyRun) -> str:
    """2 bits, or the least that the truth has."""
    found = study.distinct("truth", "bits")
    return "2" if "2" in found else found[0]


def main_target(study: StudyRun) -> str:
    return study.tables["verdicts"][0]["target"]


def steps_of(study: StudyRun) -> list[str]:
    return sorted(study.distinct("metrics", "steps"), key=int)


def layer_words(layer: str) -> str:
    """`blocks.3.attn.qkv` as `b3 qkv`."""
    parts = layer.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"b{numbers[0]} {parts[-1]}" if numbers else layer


def ceiling(study: StudyRun, target: str, bits: str, name: str = "spearman") -> list[float]:
    """How well the truth of each seed orders layers as the other seeds do."""
    rows = study.of("ceiling", target=target, bits=bits)
    return [v for row in rows if (v := value(row, name)) is not None]


def agreements(study: StudyRun, bits: str = "all", **wanted: str) -> list[Row]:
    """Agreement with the main target at one width, where Spearman's rho is defined."""
    rows = study.of("agreement", target=main_target(study), bits=bits, **wanted)
    return [row for row in rows if value(row, "spearman") is not None]


def answer(study: StudyRun) -> list[Phrase]:
    """Do PTQ metrics mislead, which metric is best, what do K steps change, how near the limit."""
    rows = study.tables["verdicts"]
    column = "ptq_sensitivities_mislead"
    said = []
    for verdict, verb in _VERBS.items():
        widths = [row["bits"] for row in rows if row[column] == verdict and row["bits"] != "all"]
        if widths:
            said.append(f"{verb} at {bits_text([int(bits) for bits in widths])}")
    phrases = [
        Phrase(
            f"With {study.title}, sensitivities measured before training "
            f"{', and '.join(said) if said else 'were judged at no single bit width'}"
        )
    ]
    for row in rows:
        gain = value(row, "gain")
        if row["bits"] == "all" and gain is not None:
            phrases += [
                Phrase(f"; over all bit widths they {_VERBS[row[column]]}: "),
                *_change(study, row),
                Phrase(" (a gain of "),
                Phrase(f"{two(gain)} [{_interval(row)}]", study.href),
                Phrase(")"),
            ]
    phrases.append(Phrase("."))
    found = agreements(study)
    if found:
        best = max(found, key=lambda row: float(row["spearman"]))
        phrases += [
            Phrase(
                f" The metric nearest to the truth is {best['metric']} {after(best['steps'])}, ρ "
            ),
            Phrase(f"{two(float(best['spearman']))} {span(best, 'spearman', two)}", study.href),
            Phrase(" over all bit widths"),
        ]
        limit = ceiling(study, main_target(study), "all")
        if limit:
            phrases.append(
                Phrase(
                    "; the truth of one training seed agrees with that of the others to "
                    f"{two(statistics.fmean(limit))} (the ceiling)"
                )
            )
        phrases.append(Phrase("."))
    return phrases


def points(study: StudyRun) -> list[list[Phrase]]:
    """How agreement changes with K, which metrics to prefer, and what recovers."""
    found = []
    main = study.tables["verdicts"][0]["metric"]
    for bits in study.distinct("agreement", "bits"):
        rows = agreements(study, bits, metric=main)
        if rows:
            by_steps = joined(
                (
                    Phrase(f"{two(float(row['spearman']))} {after(row['steps'])}", study.href)
                    for row in rows
                ),
                ", ",
            )
            limit = ceiling(study, main_target(study), bits)
            end = f"; ceiling {two(statistics.fmean(limit))}." if limit else "."
            found.append([Phrase(f"ρ of {main} at {width_words(bits)}: "), *by_steps, Phrase(end)])
    ranked = sorted(agreements(study, steps="0"), key=lambda row: -float(row["spearman"]))
    if ranked:
        listed = joined(
            (
                Phrase(f"{row['metric']} {two(float(row['spearman']))}", study.href)
                for row in ranked
            ),
            ", ",
        )
        found.append([Phrase("Before training, over all bit widths: "), *listed, Phrase(".")])
    recovered = group(study.tables.get("recovered", []), "bits")
    for (bits,), rows in recovered.items():
        names = listing(layer_words(row["layer"]) for row in rows)
        text = (
            f"At {width_words(bits)}, among the {rows[0]['top_k']} worst layers before training "
            f"but not of the truth: {names}."
        )
        found.append([Phrase(text)])
    if not recovered:
        found.append([Phrase("No layer is among the worst before training and not of the truth.")])
    return found


def additivity_words(study: StudyRun) -> str:
    """Median of actual over predicted, of pairs and of whole allocations."""
    parts = []
    for (kind, steps), rows in group(study.tables.get("interactions", []), "kind", "steps").items():
        ratios = [ratio for row in rows if (ratio := value(row, "ratio")) is not None]
        if ratios:
            what = "pairs" if kind == "pair" else "whole allocations"
            parts.append(
                f"{two(statistics.median(ratios))} for {len(ratios)} {what} {after(steps)} "
                f"({two(min(ratios))} to {two(max(ratios))})"
            )
    if not parts:
        return "Additivity: not run."
    return (
        "The allocator adds up sensitivities. Measured over predicted change of the noise "
        f"prediction, median (range): {'; '.join(parts)}. 1 is exact additivity."
    )


def truth_note(study: StudyRun) -> str:
    """Size, and noise, of the truth."""
    rows = study.of("truth", target=main_target(study))
    increases = [v for row in rows if (v := value(row, "increase")) is not None]
    if not increases:
        return "no values"
    below = sum(v <= 0 for v in increases)
    text = f"from {three(min(increases))} to {three(max(increases))}, logarithmic"
    return text + (f"; {plural(below, 'blank cell')} not above 0" if below else "")


def caveats(study: StudyRun) -> list[str]:
    """What these numbers cannot say."""
    layers, options = study.distinct("truth", "layer"), study.options
    rows = study.of("truth", target=main_target(study))
    noisy = 0
    for row in rows:
        increase, std = value(row, "increase"), value(row, "std")
        noisy += increase is not None and std is not None and std >= abs(increase)
    seeds = study.distinct("truth", "seeds")
    found = [
        f"One model of {len(layers)} layers that can be allocated, on {study.run.workload_name}: "
        "orders of layers in a large model may differ.",
        f"Training seeds of the truth per layer and bit width: {listing(seeds)}; steps of each: "
        f"{options.get('truth_steps', 'not recorded')}. Longer training may order layers "
        "otherwise.",
        f"The spread of the truth over seeds is at least its mean in {noisy} of {len(rows)} cells "
        f"({main_target(study)}), and order among such layers is chance.",
        "Intervals resample layers, not calibration batches or training seeds, and the verdicts at "
        "several bit widths are not corrected for their number.",
        "The metric nearest to the truth is named after looking, the best of "
        f"{len(agreements(study))} metrics and steps, so its ρ is optimistic.",
        "The ceiling compares one seed with the mean of the others. A metric is compared with the "
        "mean of all seeds, which is less noisy, so it may come out above the ceiling.",
        "This is the order of layers, not the worth of the bits chosen by it: which sensitivities "
        "allocate better is the question of study allocation.",
        "A layer counts as recovered when it leaves the worst by the truth: with this few layers, "
        "noise alone moves some.",
    ]
    return found


def sensitivity_claims(study: StudyRun) -> list[Claim]:
    """The verdicts of the run, one claim per bit width."""
    found = []
    for row in study.tables["verdicts"]:
        gain = value(row, "gain")
        evidence = [Phrase("Spearman’s ρ is not defined.")]
        if gain is not None:
            evidence = [
                Phrase(f"ρ of {row['metric']} {after(row['steps_after'])} minus before: "),
                Phrase(f"{two(gain)} [{_interval(row)}]", study.href),
                Phrase("."),
            ]
        text = f"Sensitivities measured before training misrank layers: {width_words(row['bits'])}"
        found.append(Claim(text, row["ptq_sensitivities_mislead"], evidence))
    return found


def _change(study: StudyRun, row: Row) -> list[Phrase]:
    """Agreement before and after the last K steps, for one line of the verdicts."""
    found = [
        value(rows[0], "spearman")
        for steps in (row["steps_before"], row["steps_after"])
        if (rows := agreements(study, row["bits"], metric=row["metric"], steps=steps))
    ]
    text = f"Spearman’s ρ of {row['metric']} with the truth"
    if len(found) < 2:
        return [Phrase(f"{text} changes {after(row['steps_after'])}")]
    before, later = (two(number or 0) for number in found)
    return [
        Phrase(f"{text} is "),
        Phrase(before, study.href),
        Phrase(" before training and "),
        Phrase(later, study.href),
        Phrase(f" {after(row['steps_after'])}"),
    ]


def _interval(row: Row) -> str:
    low, high = value(row, "low"), value(row, "high")
    return "no interval" if low is None or high is None else f"{two(low)} to {two(high)}"
