"""`study packed`: what deployment changes, against the trained student of a real small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robuq_bench.cli.app import main
from robuq_bench.data.datasets import ImageData, load_dataset, make_image_data
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
    metrics = json.loads(
        next(
            line for line in (trained / "train-and-eval" / run_of(trained) / "results.jsonl")
            .read_text().splitlines() if '"metrics/student/0"' in line
        )
    )  # fmt: skip
    assert rows["trained"]["fid_digits_min"] <= metrics["fid_digits"] + 1e-9
    assert metrics["fid_digits"] - 1e-9 <= rows["trained"]["fid_digits_max"]


def test_settings_and_study_know_the_same_variants() -> None:
    assert tuple(packed.VARIANTS) == settings.VARIANTS


def test_what_it_needs_is_said(
    trained: Path, tiny_workload: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        ((), "needs a finished train-and-eval run: --checkpoint RUN"),
        (("--checkpoint", "nothing"), "unknown run 'nothing'"),
        (("--set", 'packed.variants=["int4"]'), "unknown 'int4'"),
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

    monkeypatch.setattr(packed, "load_dataset", other)
    fresh = ("--checkpoint", run_of(trained), "--set", 'packed.variants=["int8"]')
    assert main(study(trained, tiny_workload, *fresh)) == 4
    assert "was measured with other data" in capsys.readouterr().out
