"""Code of the guides runs as written."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from robuq_bench.config import load_plan
from robuq_bench.quantization.linear import QuantizedLinear

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(guide: str, language: str) -> list[str]:
    """Code blocks of a guide in their order."""
    text = (DOCS / guide).read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.S | re.M)
    return [textwrap.dedent(block) for block in found]


def run(guide: str, code: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "guide"}
    for block in code:
        exec(compile(block, guide, "exec"), names)
    return names


def test_the_guide_to_ones_own_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("your-own-model.md", "python")
    assert len(code) == 2
    names = run("your-own-model.md", code)
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
    assert plan.needs == {"absmax", "gram", "tokens"}


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
        names = run("add-a-method.md", [registered])
        assert isinstance(names["model"][0], QuantizedLinear)
        assert "activation=pow2" in capsys.readouterr().out
        names = run("add-a-method.md", [calibrated])
        assert names["model"][2].scaling is not None
    finally:
        sys.modules.pop("pow2", None)
