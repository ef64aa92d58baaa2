"""Tables and JSON lines."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from robuq_bench.cli.console import format_table, plain, print_json, print_table, set_up_logging


def test_tables_align_numbers_right_and_say_not_run() -> None:
    rows = [{"plan": "a2", "fid": 12.34567, "n": 1000}, {"plan": "baseline-a2", "fid": None}]
    assert format_table(rows).splitlines() == [
        "plan             fid        n",
        "-----------  -------  -------",
        "a2             12.35     1000",
        "baseline-a2  not run  not run",
    ]
    assert "not run" not in format_table(rows, missing="")
    assert format_table([]) == "(no rows)"
    assert "not run" in format_table([{"x": float("nan")}])


def test_tables_hold_any_text_whole_whatever_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    cells = [
        "w" * 3000,
        "a " * 150 + "c",
        "[bold]not markup[/bold] :smile:",
        "http://x/1 True 2.5",
    ]
    header, _, *lines = format_table([{"text": cell, "[n]": 1} for cell in cells]).splitlines()
    assert header.split() == ["text", "[n]"]
    assert [line.removesuffix("1").rstrip() for line in lines] == cells
    assert len({len(line) for line in lines}) == 1
    tall = format_table([{"text": "one\ntwo", "n": 12}, {"text": "日本", "n": 3}])
    assert format_table([{"a": "x\ty"}]).splitlines()[2] == "x       y"
    assert tall.splitlines()[2:] == ["one   12", "two", "日本   3"]  # two cells of the screen each


def test_a_wide_table_is_turned_only_if_it_then_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback: os.terminal_size((40, 24)))
    wide = [{"subject": s} | {f"metric_{i}": i for i in range(8)} for s in ("teacher", "student")]
    print_table(wide)
    assert capsys.readouterr().out.splitlines()[0].split() == ["subject", "teacher", "student"]
    print_table([{"subject": "x", "about": "y" * 80}])
    assert capsys.readouterr().out.splitlines()[0].split() == ["subject", "about"]
    print_table([{"subject": "x", **{f"metric_{i}": i for i in range(8)}}] * 2)  # names repeat
    assert capsys.readouterr().out.splitlines()[0].startswith("subject  metric_0")


def test_json_is_strict_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "nan": float("nan"),
        "inf": float("-inf"),
        "numpy": np.float64(0.5),
        "path": Path("a/b"),
        1: (True, None, {"x": np.int64(3)}),
    }
    print_json(values)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "nan": None, "inf": None, "numpy": 0.5, "path": "a/b", "1": [True, None, {"x": 3}],
    }  # fmt: skip
    assert plain(np.float32("nan")) is None


def test_the_log_goes_to_stderr_and_quiet_keeps_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("robuq_bench.test")
    for quiet in (False, True):
        set_up_logging(quiet=quiet)
        logger.info("information %s", quiet)
        logger.warning("a warning")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "INFO: information False\nWARNING: a warning\nWARNING: a warning\n"
