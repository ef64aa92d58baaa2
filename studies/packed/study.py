"""What packing costs in quality: a trained run's student, judged as it was and as it is deployed.

Every variant is sampled from the same image seeds under the run's own protocol and set beside the
trained, fake-quantized student:

    trained     as `train-and-eval` judged it
    reference   a lossless packed file, dequantized: must give the very same images
    integer     the same file in the kernels' arithmetic (integer sums, one dequantization)
    cpu         the same sums by a CPU's integer instructions, the default of `sample` there
    triton      the same file on the kernels, in float32
    fp16, int8  low-rank branch and everything full-precision stored so, dequantized

`pixel_difference` is the mean absolute difference to the trained student's images in grey levels
(0 to 255); `share_of_images_equal` is that of images without any difference. `distillation_loss`
is the mean squared difference to the teacher's prediction on the protocol's fixed batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from robuq_bench.config import Config, Workload
from robuq_bench.context import Context
from robuq_bench.errors import CheckError, UsageError
from robuq_bench.inference import export_packed, load_packed, pack_, prepare_for_inference
from robuq_bench.judging.evaluation import (
    evaluate_samples,
    validation_losses,
)
from robuq_bench.judging.summary import metric_summary
from robuq_bench.judging.teacher import load_judged
from robuq_bench.runs.run import Run, open_existing
from robuq_bench.statistics.comparisons import CONFIDENCE, MIN_SEEDS, compare_plans
from robuq_bench.statistics.verdicts import Verdict, no_verdict, verdict_rows
from robuq_bench.students import load_student
from studies.packed.settings import Settings

RULE = (
    "A lossless file holds where every image is the trained student’s, bit for bit. Another "
    "variant keeps the images where all of the 95 % t interval over images of the mean absolute "
    "difference lies below one grey level of 255, does not where all of it lies above, and is "
    "undecided otherwise. FID is compared over seed ranges by the 95 % paired t interval of the "
    "ratio: equivalent within 0.97 to 1/0.97, else better or worse where it lies on that side of "
    "1, else undecided. Fewer than 5 images or ranges are not judged."
)
#: Mean absolute difference that cannot be seen in images of 8 bits.
GREY_LEVEL = 1.0
VERSION = "3"
USES_OVERRIDES = False
SUMMARY = "Does a packed model keep the quality of the trained one? Needs --checkpoint RUN."
TRAINED = "trained"
#: Variant -> storage of its file, and the backend that computes it.
VARIANTS = {
    "reference": ("base3/fp32/fp32", "reference"),
    "integer": ("base3/fp32/fp32", "integer"),
    "cpu": ("base3/fp32/fp32", "cpu"),
    "triton": ("base3/fp32/fp32", "triton"),
    "fp16": ("base3/fp16/fp16", "reference"),
    "int8": ("base3/int8/int8", "reference"),
}


def check(config: Config) -> None:
    """Refuse to go without the run of a student on this workload."""
    trained_run(config)


def trained_run(config: Config) -> Run:
    """The run whose student is judged."""
    folder = config.settings_of(Settings).run
    if folder is None:
        raise UsageError("study packed needs a finished train-and-eval run: --checkpoint RUN")
    trained = open_existing(Path(folder))
    workload = trained.config.workload
    if workload.name != config.workload.name:
        raise UsageError(f"{trained.id} is of workload {workload.name!r}; give it as --on")
    return trained


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Judge every variant; one row each. CheckError (exit 3) if a lossless file changes images."""
    options = config.settings_of(Settings)
    trained = trained_run(config)
    workload, plan = trained.config.workload, trained.config.plan
    judged = load_judged(workload, context.device)
    judged.record_inputs(trained, workload)
    run.add_input_digest("teacher", workload.teacher.sha256, run=trained.id)
    for variant in (TRAINED, *options.variants):
        model, facts = make_variant(variant, trained, workload, run, context)
        evaluate_samples(model, workload, run, context, subject=variant, judged=judged)
        if not run.has(f"variant/{variant}"):
            losses = validation_losses(
                model, judged.teacher, judged.data, workload, context.device, judged.heldout
            )
            difference = image_difference(run, variant, workload)
            run.append(
                f"variant/{variant}", kind="variant", variant=variant, plan=plan.name,
                run=trained.id, **facts, **difference, **losses,
            )  # fmt: skip
    rows = table(run, options.variants)
    run.write_table("packed", rows)
    found = verdicts(run, options.variants, workload)
    run.write_table("verdicts", verdict_rows(found, RULE))
    for row in rows:
        if row["variant"] == "reference" and row["share_of_images_equal"] < 1:
            raise CheckError(
                f"the lossless file changed {1 - row['share_of_images_equal']:.1%} of the images; "
                f"see {run.path / 'tables' / 'packed.csv'}"
            )
    return rows


def make_variant(
    variant: str, trained: Run, workload: Workload, run: Run, context: Context
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a variant on the device, and what its file weighs."""
    student = load_student(trained.path, workload).eval()
    if variant == TRAINED:
        facts = {"storage": None, "backend": None, "file_bytes": None, "size_reduction": None}
        return student.to(context.device), facts
    storage, backend = VARIANTS[variant]
    path = run.path / "checkpoints" / f"{storage.replace('/', '-')}.safetensors"
    path.parent.mkdir(exist_ok=True)
    total = export_packed(
        pack_(student),
        path,
        plan=trained.config.plan,
        model_config=workload.model,
        storage=storage,
        source=trained.id,
    )[-1]
    model, _ = load_packed(path)
    prepared = prepare_for_inference(model.to(context.device), backend, torch.float32)
    return prepared, {
        "storage": storage,
        "backend": backend,
        "file_bytes": total["bytes"],
        "size_reduction": total["size_reduction"],
    }


def image_difference(run: Run, variant: str, workload: Workload) -> dict[str, float]:
    """How far the images of a variant are from the trained student's, over all seed ranges."""
    mean, largest = pixel_differences(run, variant, workload)
    return {
        "pixel_difference": float(mean.sum()) / len(mean),
        "share_of_images_equal": int((largest == 0).sum()) / len(mean),
    }


def pixel_differences(
    run: Run, variant: str, workload: Workload
) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
    """Mean and largest absolute difference of every image [N] to the trained student's."""
    found = []
    for index in range(workload.evaluation.seed_ranges):
        mine, theirs = (
            np.load(run.path / "samples" / f"{subject}-{index}.npz")["arr_0"].astype(np.int16)
            for subject in (variant, TRAINED)
        )
        found.append(np.abs(mine - theirs).reshape(len(mine), -1))
    difference = np.concatenate(found)
    return difference.mean(1), difference.max(1)


def verdicts(run: Run, variants: tuple[str, ...], workload: Workload) -> list[Verdict]:
    """Of the lossless file, then of every other variant's images and FID."""
    found = []
    for variant in variants:
        mean, largest = pixel_differences(run, variant, workload)
        if variant == "reference":
            found.append(judge_lossless(largest))
        else:
            found.append(judge_images(variant, mean))
            found += judge_fid(variant, run.results())
    return found


def judge_lossless(largest: NDArray[np.int16]) -> Verdict:
    """Whether every image [N] is without any difference."""
    return Verdict(
        claim="A lossless packed file gives the trained student’s images",
        subject="reference",
        verdict="holds" if (largest == 0).all() else "does not hold",
        effect=float((largest == 0).mean()),
        effect_name="share of images equal",
        low=None,
        high=None,
        n=len(largest),
        n_of="images",
        test="comparison bit for bit",
        p_value=None,
    )


def judge_images(variant: str, mean: NDArray[np.float64]) -> Verdict:
    """Whether images differ by less than a grey level, from their mean differences [N]."""
    from statsmodels.stats.weightstats import DescrStatsW

    low = high = None
    word, note = "not judged", f"{MIN_SEEDS} images are needed"
    if len(mean) >= MIN_SEEDS:
        low, high = map(float, DescrStatsW(mean).tconfint_mean(1 - CONFIDENCE))
        is_kept, is_changed = high < GREY_LEVEL, low > GREY_LEVEL
        word, note = "holds" if is_kept else "does not hold" if is_changed else "undecided", ""
    return Verdict(
        claim=f"{variant} changes images by less than one grey level of 255",
        subject=variant,
        verdict=word,
        effect=float(mean.mean()),
        effect_name="mean absolute pixel difference",
        low=low,
        high=high,
        confidence=CONFIDENCE,
        n=len(mean),
        n_of="images",
        test="none" if low is None else "t interval over images",
        p_value=None,
        note=note,
    )


def judge_fid(variant: str, records: Iterable[dict[str, Any]]) -> list[Verdict]:
    """A variant's FID beside the trained student's over seed ranges; none without FID."""
    metrics = pd.DataFrame([r for r in records if r.get("kind") == "metrics"])
    names = [str(name) for name in metrics if str(name).startswith("fid_")]
    names = [name for name in names if not name.endswith("_is_rank_deficient")]
    found = []
    for name in names:
        # Ranges are the units here: the student is of one training seed.
        values = metrics.assign(
            plan=metrics["subject"], seed=metrics["seed_range"], image_range=0, value=metrics[name]
        )
        claim = f"{variant} has another {name} than the trained student"
        own = values[values["plan"].isin([variant, TRAINED])]
        if (bad := own[~(np.isfinite(own["value"]) & (own["value"] > 0))]).size:
            found.append(_without_ratio(variant, claim, name, bad))
            continue
        judged = compare_plans(values, variant, TRAINED, name)
        few = (
            f"{MIN_SEEDS} seed ranges are needed, which are the run's own: judge one of "
            f"train-and-eval --set evaluation.seed_ranges={MIN_SEEDS}"
        )
        found.append(
            replace(
                judged,
                claim=claim,
                n_of="seed ranges",
                test="none" if judged.low is None else "paired t over seed ranges",
                note=few if judged.n < MIN_SEEDS else judged.note,
            )
        )
    return found


def _without_ratio(variant: str, claim: str, name: str, bad: pd.DataFrame) -> Verdict:
    """What is said where values of FID are not numbers above 0."""
    where = ", ".join(f"{row.subject} in range {row.seed_range}" for row in bad.itertuples())
    note = f"not a number above 0, so without a ratio: {where}"
    return no_verdict(
        claim, variant, f"ratio of geometric means of {name}", note, n_of="seed ranges"
    )


def table(run: Run, variants: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per variant: file, metrics as mean [min, max] over seed ranges, differences."""
    rows = []
    for variant in (TRAINED, *variants):
        found = run.get(f"variant/{variant}") or {}
        facts = {key: value for key, value in found.items() if key not in ("key", "kind")}
        rows.append(facts | metric_summary(run.results(), variant))
    return rows
