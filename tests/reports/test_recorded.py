"""The recorded runs are sound, and a report of them shows the numbers that were recorded.

Sums and counts are of the tables that the studies wrote when they ran, digits to the last place.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from copies import copy_runs

from reports import build_report
from reports.loading import find_runs
from robuq_bench.runs.run_files import list_runs, verify_run

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "reports" / "recorded"
RUNS = {
    "cpu": 1,
    "digits": 23,
    "digits-allocation": 2,
    "digits-normality": 1,
    "packed-and-kernels": 3,
}

# (rows, {column: (numbers, their sum)}) of the tables written beside each report.
EXPORTED: dict[str, dict[str, tuple[int, dict[str, tuple[int, float]]]]] = {
    "cpu": {
        "efficiency-cpu_factors": (
            36,
            {
                "factor": (36, 70.92061400832054),
                "factor_low": (36, 66.63966843940135),
                "factor_high": (36, 75.33304015083749),
            },
        ),
        "efficiency-claims": (195, {"modelled_factor": (27, 184.68723886519075)}),
    },
    "digits": {
        "metrics": (440, {"value": (440, 916.5931484623778)}),
        "summary": (
            96,
            {
                "mean": (96, 169.09110284447274),
                "min": (96, 165.20433229615097),
                "max": (96, 172.14717348218917),
            },
        ),
        "training": (
            1050,
            {
                "loss": (1050, 20.51549676058348),
                "distillation_loss": (1050, 12.172927785728826),
                "denoising_loss": (1050, 83.4256883231923),
                "learning_rate": (1050, 0.5271),
                "grad_norm": (1050, 168.45063714729622),
            },
        ),
        "sensitivity": (384, {"mse": (384, 0.24126527118949373)}),
        "allocation": (336, {"activation_bits": (336, 1029.0), "macs": (336, 334430208.0)}),
        "accounting": (1061, {"value": (1017, 5595027992.043537)}),
    },
    "digits-allocation": {
        "sensitivity-agreement": (
            560,
            {
                "spearman": (560, 257.4309470817427),
                "spearman_low": (560, 70.56322274482557),
                "spearman_high": (560, 401.697082894392),
                "kendall": (560, 195.60516629438206),
                "top_k_overlap": (560, 257.5),
            },
        ),
        "allocation-candidates": (
            16,
            {
                "distillation_loss": (16, 0.075533929746598),
                "denoising_loss": (16, 1.2462981768573325),
                "sample_mse": (16, 0.11556606491406758),
                "fid": (16, 8.230610052797772),
                "fid_vs_uniform": (14, 0.16139166138166652),
            },
        ),
    },
    "digits-normality": {
        "normality-types": (
            124,
            {
                "shapiro_w_median": (124, 120.14769130945206),
                "kurtosis_median": (124, 136.28930691920687),
                "kl": (124, 7.982322697264704),
                "shapiro_rejected": (124, 28.9341796875),
            },
        ),
        "normality-verdicts": (
            620,
            {
                "ratio": (620, 21217.258668118076),
                "lower_95": (620, 20548.52850527251),
                "upper_95": (620, 21939.8648592873),
                "cells_passing": (620, 390.225),
                "draws_max": (100, 105.5417805314064),
            },
        ),
    },
    "packed-and-kernels": {
        "kernels-kernel_checks": (
            64,
            {
                "max_error": (64, 14.786054202048238),
                "h100_least_us": (64, 3906.000227634258),
            },
        ),
        "kernels-roofline": (1600, {"least_us": (1600, 55495.66404464301)}),
        "efficiency-checkpoints": (
            17,
            {"total_bytes": (17, 3269796864.0), "size_reduction": (17, 242.5560852845412)},
        ),
        "efficiency-weights": (9, {"weight_bytes": (8, 10075457152.0)}),
        "efficiency-claims": (168, {"modelled_factor": (27, 187.04878117729052)}),
    },
}
# What a row of some table of the page reads, as it did in the report that was recorded.
SHOWN = {
    "cpu": [
        ("step", "w1.58a4", "amx-int8", "4.95", "1.53", "1.98"),
        ("block", "w1.58a4", "avx512-vnni", "2.92", "0.894"),
    ],
    "digits": [
        ("teacher", "0.18", "[0.17–0.19]", "0.898"),
        ("teacher", "0", "0.0719"),
        ("a2", "0.32", "[0.27–0.36]"),
        ("baseline-a2", "0.83", "[0.73–0.94]"),
        ("bitnetv2-a3", "3.05", "[3.03–3.07]"),
        ("a4", "123 M", "3.25 M", "5.18×", "1.16 MiB"),
    ],
    "digits-allocation": [
        ("1 bit", "undecided", "0.82", "0.86"),
        ("2 bits", "does not hold", "0.88", "0.52"),
        ("3 bits", "undecided", "0.53", "0.09"),
        ("all bit widths", "undecided", "[−0.00087 to 0.05331]", "0.87", "0.72"),
        ("uniform", "0.00590", "0.0791", "0.00843", "0.54", "[0.51–0.56]"),
    ],
    "digits-normality": [
        ("qkv", "before", "2.416", "2.324", "2.329", "2.221"),
        ("qkv", "plain Hadamard", "1.274", "1.302", "1.258", "1.260"),
        ("qkv (144)", "0.8823", "0.9906", "0.9911", "0.2004"),
        ("proj (144)", "holds 1.012 [0.996 to 1.028]", "undecided 1.183 [0.88 to 1.48]"),
    ],
    "packed-and-kernels": [
        ("15.79×", "base3/fp16/fp16"),
        ("ideal/fp32/fp32", "126.38", "45.28", "197.45", "13.04×"),
        ("1.69", "1.05", "1.61×", "2.84×", "16.3×"),
    ],
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@pytest.fixture(scope="module", params=sorted(RUNS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the recorded runs, in a folder of the recorded name."""
    output = tmp_path_factory.mktemp("recorded") / request.param / "report.html"
    output.parent.mkdir()
    return build_report([RECORDED / request.param / "runs"], output)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_recorded_runs_are_whole(name: str) -> None:
    root = RECORDED / name / "runs"
    found = list_runs(root)
    assert [run.state for run in found] == ["done"] * RUNS[name]
    assert {run.id: verify_run(run.path) for run in found} == {run.id: [] for run in found}
    runs, left_out = find_runs([root])
    assert len(runs) == RUNS[name]
    assert left_out == []
    for run in runs:
        assert run.path.name.endswith("-" + run.manifest["config_sha256"][:12])
        assert run.manifest["id"] == f"{run.study}/{run.path.name}"
        if name == "cpu":  # as it was made
            continue
        assert "not kept" in run.manifest["rebuilt"]
        kept = {file: entry["sha256"] for file, entry in run.manifest["outputs"].items()}
        lost = run.manifest["outputs_not_kept"]
        assert kept.keys() & lost.keys() <= {"results.jsonl"}


def test_exported_tables_hold_the_recorded_numbers(built: Path) -> None:
    for name, (count, columns) in EXPORTED[built.parent.name].items():
        lines = rows(built.with_name(f"report-{name}.csv"))
        assert len(lines) == count, name
        for column, (numbers, total) in columns.items():
            found = [number for line in lines if (number := as_number(line[column])) is not None]
            assert len(found) == numbers, (name, column)
            assert math.fsum(found) == pytest.approx(total, rel=1e-14), (name, column)


def test_page_shows_the_recorded_numbers(built: Path, parse_page: Callable[[Path], Any]) -> None:
    lines = [
        " ".join(f"{cell.text} {cell.small}" for cell in row)
        for table in parse_page(built).tables
        for row in table.rows
    ]
    for words in SHOWN[built.parent.name]:
        assert any(all(word in line for word in words) for line in lines), words


def test_documented_command_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    name = built.parent.name
    command = ["bench.py", "report", f"reports/recorded/{name}/runs", "--html"]
    assert " ".join(["python", *command]).replace(name, "digits") in (
        RECORDED / "README.md"
    ).read_text("utf-8")
    subprocess.run(
        [sys.executable, *command, str(tmp_path / "report.html")],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1", "ROBUQ_CACHE": str(tmp_path / "cache")},
        check=True,
    )
    again = {path.name: path.read_bytes() for path in tmp_path.glob("report*")}
    assert again == {path.name: path.read_bytes() for path in built.parent.iterdir()}
    assert len(again["report.html"]) < 2_000_000


def test_packed_study_judged_the_recorded_student_alike() -> None:
    """By later code, which rounds differently: the same weights, sampled and judged once more."""
    table = next(RECORDED.glob("packed-and-kernels/runs/packed/*/tables/packed.csv"))
    trained = next(line for line in rows(table) if line["variant"] == "trained")
    lines = (RECORDED / "digits" / "runs" / trained["run"] / "results.jsonl").read_text("utf-8")
    records = [json.loads(line) for line in lines.splitlines()]
    own = [record for record in records if record.get("subject") == "student"]
    for metric in ("fid_digits", "sfid_digits", "is_digits", "precision_digits", "recall_digits"):
        mean = math.fsum(record[metric] for record in own) / 3
        assert mean == pytest.approx(float(trained[metric]), rel=0.005), metric
    losses = next(record for record in records if record["key"] == "validation")
    for name in ("distillation_loss", "denoising_loss"):
        assert losses[name] == pytest.approx(float(trained[name]), rel=0.001), name


def test_copies_are_sound_runs_of_other_seeds(tmp_path: Path) -> None:
    originals = sorted(RECORDED.glob("digits/runs/train-and-eval/*"))
    copy_runs(originals, tmp_path, 30)
    runs, left_out = find_runs([tmp_path])
    assert left_out == []
    assert {run.seed for run in runs} == set(range(1000, 1030))
    assert all(verify_run(run.path) == [] for run in runs)
    assert len({run.path.name for run in runs}) == 30
    counts = Counter(run.plan_name for run in runs)
    assert counts["fp"] == 1
    assert counts["a2"] == 6  # three originals, each taken twice


def test_300_runs_are_a_small_page_in_seconds_without_torch(tmp_path: Path) -> None:
    copy_runs(sorted(RECORDED.glob("digits/runs/train-and-eval/*")), tmp_path / "runs", 300)
    output = tmp_path / "report.html"

    def build() -> tuple[float, set[str]]:
        program = (
            "import sys, time; from pathlib import Path; import reports; "
            "reports.build_report([Path(sys.argv[1])], Path(sys.argv[2])); "
            "print(time.process_time(), *{'torch', 'pandas', 'matplotlib'} & {*sys.modules})"
        )
        command = [sys.executable, "-c", program, tmp_path / "runs", output]
        environment = {**os.environ, "ROBUQ_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
        seconds, *modules = done.stdout.split()
        return float(seconds), set(modules)

    seconds, modules = build()
    assert modules == {"pandas", "matplotlib"}
    assert seconds < 20  # 6 when written, on one core of 2.5 GHz
    assert output.stat().st_size < 2_000_000
    ends = rows(tmp_path / "report-accounting.csv")
    assert len({line["run"] for line in ends}) == 300
    first = output.read_bytes()
    seconds, _ = build()  # of the pictures that were drawn before
    assert seconds < 12  # 4
    assert output.read_bytes() == first
