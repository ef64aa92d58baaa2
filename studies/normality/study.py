"""Is every token's activation normal after a Hadamard transform? The claim RobuQ rests on.

`RULE` was fixed before any activation was seen, `OUTPUT_RULE` before any output was.

Steps: diffuse real images to evenly spread timesteps (`subjects.py`); sample tokens at the input of
every layer that the plan quantizes; measure each token under every transform, and its error at the
layer's output (`parts.py`); do the same to tokens whose distribution is known (a Gaussian null, and
controls that are not normal); then the evidence that needs single tokens: the Berry-Esseen bound
against the exact distance, its decay with the width, projections, and what a test rejects at which
n. Nothing is tuned to the outcome: p-values stand beside their n and the null's share, degenerate
tokens are counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.errors import MissingResourceError, UsageError
from robuq_bench.normality import evidence, judgements, output_rows, summaries
from robuq_bench.normality.analysis import TokenTable, null_table
from robuq_bench.normality.capture import Captured
from robuq_bench.normality.names import TRANSFORMS
from robuq_bench.normality.statistics import MIN_N
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from robuq_bench.students import read_student
from studies.normality.parts import (
    Layers,
    measure_tokens,
    read_energies,
    read_parts,
    skipped_rows,
)
from studies.normality.settings import Settings
from studies.normality.subjects import live, saved_captures

VERSION = "7"
SUMMARY = "Are activations normal after Hadamard, and what does it cost where they are not?"
RULE = """\
Fixed before any activation was seen, amended once. For a layer type, a transform and b bits, take \
each token's mean squared error under the uniform mid-rise quantizer with RobuQ's steps and its \
mean-absolute-deviation scale, divide it by the token's variance and by the value for N(0, 1) \
(0.3634, 0.1188, 0.03744, 0.01154 at 1 to 4 bits), and average over tokens. "Normal enough for b \
bits" holds if the upper end of the 95 % interval of that mean is below 1.05, does not hold if the \
lower end is at or above 1.05, and is undecided in between. The interval resamples whole images, \
because tokens of one image are not independent; with fewer than 16 nothing is judged. Amended \
after the first run: signs are a draw, and one draw moved proj by more than the interval over \
images, so for the randomised transform the mean also runs over several draws and the interval \
allows for their spread. At 8 bits true Gaussian tokens of width 144 can exceed 1.05 themselves, \
because few values decide the overload: the null beside each verdict says by how much. No verdict \
has a p-value and none is corrected for their number: each is its own at 95 %, and one in 40 can \
be expected to hold or not to hold falsely, at most and if the interval covers as it should."""
OUTPUT_RULE = """\
Fixed before any output was looked at. For a layer, a transform and b bits, the output error is \
the sum over tokens of ||W(Q(x) - x)||^2, W the full-precision weight, Q the quantizer of the \
other rule in the transform's basis; the output ratio is that error over what normal tokens N(0, \
s^2) give, with s^2 the mean of ||x - m||^2 over tokens and inputs and m the mean token of the \
layer: energy that is one constant vector counts as error to be avoided, not as signal. "As good \
as normal in the output for b bits" holds for a layer type if the upper end of the 95 % interval \
of the mean ratio over layers is below 1.05, does not hold if the lower end is at or above 1.05, \
and is undecided in between. Images are resampled whole; with fewer than 16 nothing is judged. \
Under random signs the mean also runs over several draws, and the interval allows for their \
spread. No verdict is corrected for their number."""
PROBE_TOKENS = 512  # at most, per layer
HEADLINE = ("identity", "randomized-hadamard")


def check(config: Config) -> None:
    """Refuse saved activations that are not here, and a student that is not of the workload."""
    options = config.settings_of(Settings)
    captured = options.captured
    if options.student:
        read_student(Path(options.student), config.workload)
    if captured and not Path(captured).is_dir():
        raise MissingResourceError(
            f"{captured}: no such folder; save activations with "
            "`study normality --set normality.save_activations=true`"
        )


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Capture, measure, summarise; returns one line per subject and layer type."""
    options = config.settings_of(Settings)
    transforms = options.transforms or TRANSFORMS
    captures = saved_captures(options, run) if options.captured else live(config, run, context)
    probes: dict[str, Captured] = {}
    layers: dict[str, Layers] = {}
    dtypes: set[torch.dtype] = set()
    for capture in captures:
        subject = capture.subject
        # A subject's calibration tokens come first, and serve as its examples too.
        if subject not in probes:
            probes[subject] = {
                layer: part.spread(PROBE_TOKENS)
                for layer, part in capture.layers.items()
                if part.tokens.shape[1] >= MIN_N and len(part.tokens)
            }
            layers[subject] = Layers(
                transforms, config.seed, probes[subject], capture.weights, capture.timestep < 0
            )
        dtypes |= {part.tokens.dtype for part in capture.layers.values()}
        if capture.timestep >= 0:
            measure_tokens(capture, layers[subject], run, context, options.sign_draws)
    if not probes:
        raise MissingResourceError(f"{options.captured}: holds no shards of activations")
    if not any(probes.values()):
        raise UsageError(f"no captured layer has tokens of {MIN_N} inputs, which a test needs")
    null_dtype = min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))
    tables = summary_tables(config, run, null_dtype)
    tables |= evidence.evidence_tables(probes, options, config.seed, context.progress)
    for name, rows in tables.items():
        if rows:
            run.write_table(name, rows)
    table = headline(tables["types"], tables["judgements"])
    for row in table:
        run.append(f"normality/{row['subject']}/{row['layer_type']}", kind="normality", **row)
    return table


def summary_tables(
    config: Config, run: Run, null_dtype: torch.dtype
) -> dict[str, list[dict[str, Any]]]:
    """Tables of what was measured, by layer, timestep and layer type, and both rules' verdicts."""
    options = config.settings_of(Settings)
    settings = summaries.Settings(options.alpha, options.bootstrap_draws, config.seed)
    nulls: dict[int, TokenTable] = {}
    energies, weights = read_energies(run)
    layers = output_rows.layer_energies(energies)
    names = ("cells", "types", "errors", "lyapunov", *output_rows.TABLES)
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    # One transform at a time bounds the memory.
    for transform in options.transforms or TRANSFORMS:
        cells = read_parts(run, transform)
        for n in sorted({cell.table.n for cell in cells} - nulls.keys()):
            nulls[n] = null_table(n, options.control_tokens, null_dtype, config.seed)
        tables["cells"] += summaries.cell_rows(cells, settings)
        tables["types"] += summaries.type_rows(cells, nulls, settings)
        tables["errors"] += summaries.error_rows(cells, nulls, settings)
        tables["lyapunov"] += summaries.lyapunov_rows(cells)
        outputs = output_rows.output_rows(cells, layers, weights, settings, null_dtype)
        for name, rows in outputs.items():
            tables[name] += rows
    tables["constant"] = output_rows.constant_rows(layers, settings)
    tables["skipped"] = skipped_rows(run)
    types, outputs_by_type = tables["types"], tables["output"]
    judged = judgements.judgement_rows(tables["errors"], tables["cells"], outputs_by_type)
    tables["judgements"] = judged
    tables["verdicts"] = verdict_rows(judgements.verdicts(types, judged), RULE) + verdict_rows(
        judgements.output_verdicts(types, outputs_by_type), OUTPUT_RULE
    )
    return tables


def headline(types: list[dict[str, Any]], judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before and after, per subject and layer type, and at which bits each rule holds."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in types:
        if row["transform"] not in HEADLINE:
            continue
        key = row["subject"], row["layer_type"], row["width"]
        line = found.setdefault(
            key, dict(zip(("subject", "layer_type", "width"), key, strict=True))
        )
        when = "before" if row["transform"] == "identity" else "after"
        for name, column in (("W", "shapiro_w_median"), ("KL", "kl")):
            line[f"{name}_{when}"] = row.get(column)
        own = [
            judgement
            for judgement in judged
            if all(judgement[k] == row[k] for k in summaries.KEY_FIELDS)
        ]
        for rule, word, column in (
            ("verdict", "holds", "normal_at_bits"),
            ("verdict", "undecided", "undecided_at"),
            ("output_verdict", "holds", "output_at_bits"),
        ):
            bits = [str(one["bits"]) for one in own if one.get(rule) == word]
            line[f"{column}_{when}"] = " ".join(bits) or "none"
    return list(found.values())
