"""A report is built again unless all that it is made from is what it was, and it is whole."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from reports import build_report, builder
from robuq_bench.errors import UsageError
from robuq_bench.runs import made


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The outputs of all reports that were really built."""
    found = []
    build = builder.build
    monkeypatch.setattr(
        builder, "build", lambda runs, output, source: found.append(build(runs, output, source))
    )
    return found


def test_the_same_report_is_not_built_twice(fabricate, tmp_path, builds, caplog):
    runs = [fabricate.run(plan) for plan in ("a2", "fp")]
    output = tmp_path / "report.html"
    build_report(runs, output)
    content = {path: path.read_bytes() for path in tmp_path.glob("report*")}
    with caplog.at_level(logging.INFO):
        assert build_report(runs, output) == output
    assert f"{output} was built before" in caplog.text
    assert len(builds) == 1
    assert {path: path.read_bytes() for path in tmp_path.glob("report*")} == content
    build_report(runs, tmp_path / "other.html")
    build_report(runs[:1], output)
    assert len(builds) == 3


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("name", ["report.html", "report-metrics.csv"])
@pytest.mark.parametrize("change", [_append, Path.unlink])
def test_a_report_that_was_changed_is_built_again(fabricate, tmp_path, builds, name, change):
    run, output = fabricate.run("a2"), tmp_path / "report.html"
    build_report([run], output)
    whole = (tmp_path / name).read_bytes()
    change(tmp_path / name)
    build_report([run], output)
    assert len(builds) == 2
    assert (tmp_path / name).read_bytes() == whole


def test_what_a_report_is_made_from_tells_it_apart(fabricate, tmp_path, builds, monkeypatch):
    run, output = fabricate.run("a2"), tmp_path / "report.html"
    build_report([fabricate.root], output)
    fabricate.run("a4")
    build_report([fabricate.root], output)
    assert len(builds) == 2
    monkeypatch.setattr(made, "code_digest", lambda package: "newer code")
    build_report([fabricate.root], output)
    assert len(builds) == 3
    with pytest.raises(UsageError, match="no such run folder"):
        build_report([fabricate.root, tmp_path / "nowhere"], output)
    monkeypatch.setattr(made, "cache_folder", lambda: None)
    build_report([run], output)
    build_report([run], output)
    assert len(builds) == 5


def test_a_damaged_and_an_unfinished_run_are_told_every_time(fabricate, tmp_path, builds, caplog):
    output = tmp_path / "report.html"
    for plan in ("a2", "a4"):
        damaged = fabricate.run(plan)
    build_report([fabricate.root], output)
    _append(damaged / "results.jsonl")
    for _ in range(2):
        caplog.clear()
        build_report([fabricate.root], output)
        assert f"{damaged} is left out of the report" in caplog.text
    fabricate.run("a3", finish=False)
    build_report([fabricate.root], output)
    build_report([fabricate.root], output)
    assert len(builds) == 5
