"""Studies are found by reading their files, never by importing them."""

from __future__ import annotations

from pathlib import Path

import pytest

from robuq_bench.errors import RobuqError, UsageError
from robuq_bench.study_index import (
    COMMAND_MODULES,
    command_version,
    find_study,
    list_studies,
    read_study,
    studies_folder,
)

RUN = "def run(config, run, context):\n    pass\n"


def test_names_versions_and_summaries_are_read_without_running(tmp_path: Path) -> None:
    (tmp_path / "step_time.py").write_text(
        f'raise SystemExit\nVERSION: str = "3"\nSUMMARY = "How long?"\n{RUN}'
    )
    (tmp_path / "alpha.py").write_text(f'VERSION = "1"\n{RUN}')
    (tmp_path / "figures.py").write_text("import matplotlib\n")
    (tmp_path / "_private.py").write_text(RUN)
    (tmp_path / "train_and_eval.py").write_text(f'VERSION = "1"\n{RUN}')
    assert [study.name for study in list_studies(tmp_path)] == ["alpha", "step-time"]
    study = find_study("step_time", tmp_path)
    assert (study.module, study.version, study.summary) == ("studies.step_time", "3", "How long?")
    with pytest.raises(UsageError, match="unknown study 'step-tiem'; did you mean 'step-time'"):
        find_study("step-tiem", tmp_path)


def test_a_study_without_version_or_with_bad_syntax_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"VERSION = 1\n{RUN}")
    with pytest.raises(RobuqError, match=r"a\.py must set VERSION to a text"):
        list_studies(tmp_path)
    (tmp_path / "a.py").write_text("def run(:")
    with pytest.raises(RobuqError, match=r"a\.py cannot be read"):
        list_studies(tmp_path)


def test_no_studies(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown study 'x'; there are none yet"):
        find_study("x", tmp_path)


def test_the_commands_find_their_modules() -> None:
    for module in COMMAND_MODULES:
        assert (studies_folder() / f"{module}.py").is_file()
    for module in ("train_and_eval", "train_teacher", "train_features"):
        assert command_version(module)


def test_every_study_here_says_what_it_asks() -> None:
    for study in list_studies():
        assert study.version
        assert study.summary
        assert read_study(studies_folder() / f"{study.module.split('.')[1]}.py") == study
