"""`study packed`: what deployment changes, against the trained student of a real small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robuq_bench.cli.app import main
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
from robuq_bench.judging import teacher
from robuq_bench.statistics.verdicts import read_verdicts
from studies.packed import settings
from studies.packed import study as packed


@pytest.fixture(scope="module")
def trained(tiny_workload: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder with one finished run."""
    output = tmp_path_factory.mktemp("trained") / "runs"
    arguments = ["--on", str(tiny_workload), "--plan", "a4", "-o", str(output), "--quiet"]
    assert main(["train-and-eval", *arguments]) == 0
    return output


def run_of(output: Path) -> str:
    return next(path.name for path in (output / "train-and-eval").iterdir() if path.is_dir())


def study(output: Path, workload: Path, *more: str) -> list[str]:
    return [
        "study", "packed", "--on", str(workload), "-o", str(output), "--json", "--quiet", *more,
    ]  # fmt: skip


def test_packing_is_judged_beside_the_trained_student(
    trained: Path, tiny_workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(study(trained, tiny_workload, "--checkpoint", run_of(trained))) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["variant"]: row for row in document["table"]}
    assert list(rows) == ["trained", "reference", "integer", "fp16", "int8"]
    reference = rows["reference"]
    assert reference["share_of_images_equal"] == 1
    assert reference["pixel_difference"] == 0
    assert reference["fid_digits"] == rows["trained"]["fid_digits"]
    assert reference["distillation_loss"] == rows["trained"]["distillation_loss"]
    assert rows["int8"]["file_bytes"] < rows["fp16"]["file_bytes"] < reference["file_bytes"]
    assert 0 < rows["int8"]["pixel_difference"] < 40
    run = Path(document["path"])
    images = [np.load(run / "samples" / f"{name}-0.npz")["arr_0"] for name in ("trained", "int8")]
    difference = np.abs(images[0].astype(int) - images[1].astype(int))
    both = np.abs(
        np.load(run / "samples" / "trained-1.npz")["arr_0"].astype(int)
        - np.load(run / "samples" / "int8-1.npz")["arr_0"].astype(int)
    )
    expected = (difference.mean() + both.mean()) / 2
    assert rows["int8"]["pixel_difference"] == pytest.approx(expected)
    judged = {(v.subject, v.effect_name.split()[0]): v for v in read_verdicts(
        pd.read_csv(run / "tables" / "verdicts.csv"))}  # fmt: skip
    assert judged["reference", "share"].verdict == "holds"
    assert judged["reference", "share"].n == 2 * len(images[0])
    int8 = judged["int8", "mean"]
    assert int8.effect == pytest.approx(expected)
    assert int8.low is not None
    assert int8.high is not None
    assert int8.low <= expected <= int8.high
    word = "holds" if int8.high < 1 else "does not hold" if int8.low > 1 else "undecided"
    assert int8.verdict == word
    fid = judged["int8", "ratio"]
    assert (fid.verdict, fid.n, fid.n_of) == ("not judged", 2, "seed ranges")
    metrics = json.loads(
        next(
            line for line in (trained / "train-and-eval" / run_of(trained) / "results.jsonl")
            .read_text().splitlines() if '"metrics/student/0"' in line
        )
    )  # fmt: skip
    assert rows["trained"]["fid_digits_min"] <= metrics["fid_digits"] + 1e-9
    assert metrics["fid_digits"] - 1e-9 <= rows["trained"]["fid_digits_max"]


def test_images_are_judged_by_their_interval_and_a_lossless_file_by_every_one() -> None:
    assert packed.judge_images("int8", np.full(50, 0.4)).verdict == "holds"
    assert packed.judge_images("int8", np.full(50, 1.6)).verdict == "does not hold"
    rng = np.random.default_rng(0)
    around = rng.normal(1, 0.5, 50)
    near = packed.judge_images("int8", around)
    expected = stats.ttest_1samp(around, 0).confidence_interval()
    assert (near.low, near.high) == pytest.approx((expected.low, expected.high))
    assert near.verdict == "undecided"
    assert packed.judge_images("int8", np.full(4, 0.4)).verdict == "not judged"
    one_off = np.array([0] * 99 + [1], dtype=np.int16)
    lossless = packed.judge_lossless(one_off)
    assert (lossless.verdict, lossless.effect) == ("does not hold", 0.99)
    assert packed.judge_lossless(one_off[:-1]).verdict == "holds"


def test_fid_is_paired_over_seed_ranges() -> None:
    ratios = np.exp([0.10, 0.11, 0.09, 0.10, 0.12, 0.08])
    records = [
        {"kind": "metrics", "subject": subject, "seed_range": index, "fid_digits": fid,
         "fid_digits_is_rank_deficient": 0}
        for index, ratio in enumerate(ratios)
        for subject, fid in (("trained", 2.0 + index), ("int8", (2.0 + index) * ratio))
    ]  # fmt: skip
    (found,) = packed.judge_fid("int8", records)
    interval = stats.ttest_1samp(np.log(ratios), 0).confidence_interval()
    assert found.verdict == "worse"
    assert (found.low, found.high) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
    assert (found.n, found.n_of, found.test) == (6, "seed ranges", "paired t over seed ranges")
    (few,) = packed.judge_fid("int8", records[:6])
    few_interval = stats.ttest_1samp(np.log(ratios[:3]), 0).confidence_interval()
    assert (few.verdict, few.n, few.test) == ("not judged", 3, "paired t over seed ranges")
    assert few.high == pytest.approx(np.exp(few_interval.high))
    assert few.note.endswith("judge one of train-and-eval --set evaluation.seed_ranges=5")
    (one,) = packed.judge_fid("int8", records[:2])
    assert (one.low, one.test) == (None, "none")
    (none,) = packed.judge_fid("int8", [*records[:-1], records[-1] | {"fid_digits": 0.0}])
    assert (none.verdict, none.effect) == ("not judged", None)
    assert none.note == "not a number above 0, so without a ratio: int8 in range 5"


def test_settings_and_study_know_the_same_variants() -> None:
    assert tuple(packed.VARIANTS) == settings.VARIANTS


def test_what_it_needs_is_said(
    trained: Path, tiny_workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        ((), "needs a finished train-and-eval run: --checkpoint RUN"),
        (("--checkpoint", "nothing"), "unknown run 'nothing'"),
        (("--set", 'packed.variants=["int4"]'), "unknown 'int4'"),
        (("--set", "evaluation.num_samples=8"), "evaluation.num_samples: has no effect on study"),
        (("--set", "attention.matmul_bits=4"), "judges a run by its own plan"),
    ):
        capsys.readouterr()
        assert main(study(trained, tiny_workload, *more)) == 2
        assert message in capsys.readouterr().out
    wrong = ["study", "packed", "-o", str(trained), "--checkpoint", run_of(trained), "--json"]
    assert main(wrong) == 2
    assert "give it as --on" in capsys.readouterr().out
    assert main(["study", "step-time", "--checkpoint", run_of(trained), "--json"]) == 2
    assert "takes no --checkpoint; normality and packed do" in capsys.readouterr().out


def test_a_student_is_not_judged_beside_other_data(
    trained: Path,
    tiny_workload: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after an update of what embeds the data, which no digest in the config tells."""

    def other(*args: Any, **kwargs: Any) -> ImageData:
        data = load_dataset(*args, **kwargs)
        return make_image_data(data.images.flip(0), data.labels, data.source)

    monkeypatch.setattr(teacher, "load_dataset", other)
    fresh = ("--checkpoint", run_of(trained), "--set", 'packed.variants=["int8"]')
    assert main(study(trained, tiny_workload, *fresh)) == 4
    assert "was measured with other data" in capsys.readouterr().out
