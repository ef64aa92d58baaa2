"""Code of the guides runs as written."""

from __future__ import annotations

import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports import build_report
from reports.loading import read_run
from robuq_bench.config import load_plan
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.runs.run import Run, open_existing
from robuq_bench.statistics.verdicts import read_verdicts

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(guide: str, language: str) -> list[str]:
    """Code blocks of a guide in their order."""
    text = (DOCS / guide).read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.S | re.M)
    return [textwrap.dedent(block) for block in found]


def run_code(guide: str, code: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "guide"}
    for block in code:
        exec(compile(block, guide, "exec"), names)
    return names


def test_the_guide_to_ones_own_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("your-own-model.md", "python")
    assert len(code) == 2
    names = run_code("your-own-model.md", code)
    printed = capsys.readouterr().out.splitlines()
    shown = (DOCS / "your-own-model.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) == 7
    assert all(line.rstrip() in shown for line in printed[:3])
    assert names["model"]["blocks"][1].fc2.activation_bits == 4


def test_the_plan_of_the_guide_to_plans_is_one(tmp_path: Path) -> None:
    (text,) = blocks("plans.md", "toml")
    (tmp_path / "guide.toml").write_text(text, encoding="utf-8")
    plan = load_plan(tmp_path / "guide.toml")
    assert [rule.name for rule in plan.layers] == ["attention", "adaln", "block"]
    assert plan.needs == {"absmax", "gram", "mean", "tokens"}


def test_the_guide_to_studies_runs(bench: Any, tmp_path: Path) -> None:
    study, judge, draw, section = blocks("add-a-study.md", "python")
    (tmp_path / "spectrum.py").write_text(study, encoding="utf-8")
    assert len([line for line in study.splitlines() if line.strip()]) <= 20
    document = bench("study", "spectrum.py", "--set", "spectrum.ranks=[16]", "--json").document
    run = open_existing(Path(document["path"]))
    assert run.id.startswith("spectrum/a2-digits-")
    name = "blocks.0.attn.qkv"
    model, _ = load_teacher(run.config.workload, "cpu")
    weight = model.get_parameter(f"{name}.weight").detach().numpy().astype(float)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    low_rank = left[:, :16] * values[:16] @ right[:16]
    expected = (low_rank**2).sum() / (weight**2).sum()
    (row,) = (row for row in document["table"] if row["layer"] == name)
    assert row["rank 16"] == pytest.approx(expected, rel=1e-5)
    config = run.config.model_copy(update={"seed": 1})
    with Run.open(tmp_path / "runs", config, []) as run:
        run_code("add-a-study.md", [judge])["judge"](run, document["table"])
        run_code("add-a-study.md", [draw])["draw"](run, document["table"])
        run.write_table("spectrum", document["table"])
        run.finish()
    found = read_verdicts(pd.read_csv(run.path / "tables" / "verdicts.csv"))
    assert {verdict.verdict for verdict in found} == {"holds", "does not hold"}
    report = build_report([run.path], tmp_path / "report.html").read_text("utf-8")
    assert "rank 16 holds half of the energy: " in report
    assert "data:image/svg+xml;base64," in report
    names = run_code("add-a-study.md", [section])
    shown = names["view"]([read_run(run.path)], [])
    assert set(dir(import_module("reports.packed"))) & set(names) >= {"ORDER", "QUESTION", "OPEN"}
    assert len(shown.claims) == len(found)
    assert names["EXPORTS"] == ("spectrum.csv",)
    assert len(shown.exports["spectrum"]) == len(document["table"])
    figures, sheet, _ = shown.blocks
    assert len(figures.pictures) == 1
    _, (layer, held) = sheet.rows()[0]
    assert (layer.href, held.href) == ("", read_run(run.path).href)


def test_the_guide_to_methods_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method, registered, calibrated = blocks("add-a-method.md", "python")
    (text,) = blocks("add-a-method.md", "toml")
    (tmp_path / "pow2.py").write_text(method, encoding="utf-8")
    (tmp_path / "pow2-a4.toml").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lines = [line for line in method.splitlines() if line.strip()]
    assert len(lines) <= 25  # what the guide is about: a quantizer is short
    try:
        plan = load_plan("pow2-a4.toml")
        assert plan.layers[-1].activation is not None
        assert plan.layers[-1].activation.method == "pow2:PowerOfTwo"
        assert len(plan.layers[-1].activation.sha256) == 64
        names = run_code("add-a-method.md", [registered])
        assert isinstance(names["model"][0], QuantizedLinear)
        assert "activation=pow2" in capsys.readouterr().out
        names = run_code("add-a-method.md", [calibrated])
        assert names["model"][2].scaling is not None
    finally:
        sys.modules.pop("pow2", None)
