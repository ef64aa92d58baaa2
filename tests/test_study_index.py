"""Studies are found by reading their files, never by importing them."""

from __future__ import annotations

from pathlib import Path

import pytest

from robuq_bench.config import Config, Plan, Workload
from robuq_bench.errors import UsageError
from robuq_bench.study_index import (
    RESERVED,
    find_study,
    inputs_of,
    list_studies,
    load_study,
    look_up,
    settings_class,
)

STUDY = 'VERSION = "1"\ndef measure(config, run, context):\n    return []\n'


def test_names_versions_and_summaries_are_read_without_running(tmp_path: Path) -> None:
    (tmp_path / "step_time.py").write_text(
        f'raise SystemExit\n{STUDY}VERSION: str = "3"\nSUMMARY = "How long?"\nUSES_DATA = False\n'
        'LEGEND = (\n    "a: "\n    "b"\n)\nUSES_OVERRIDES = False\n'
    )
    (tmp_path / "alpha.py").write_text(f"{STUDY}def check(config): pass\nclass Settings: pass\n")
    (tmp_path / "figures.py").write_text("import matplotlib\n")
    (tmp_path / "_private.py").write_text(STUDY)
    (tmp_path / "in_a_folder").mkdir()
    (tmp_path / "in_a_folder" / "study.py").write_text(STUDY)
    (tmp_path / "in_a_folder" / "settings.py").write_text("class Settings: pass\n")
    (tmp_path / "in_a_folder" / "tables.py").write_text(STUDY)
    alpha, folder, step_time = list_studies(tmp_path)
    assert (alpha.name, alpha.has_check, alpha.settings) == ("alpha", True, "studies.alpha")
    assert (folder.name, folder.module) == ("in-a-folder", "studies.in_a_folder.study")
    assert folder.settings == "studies.in_a_folder.settings"
    assert step_time == find_study("step_time", tmp_path)
    assert (step_time.version, step_time.summary, step_time.uses_data) == ("3", "How long?", False)
    assert (step_time.legend, step_time.uses_overrides) == ("a: b", False)
    assert (alpha.legend, alpha.uses_overrides) == ("", True)
    with pytest.raises(UsageError, match="unknown study 'step-tiem'; did you mean 'step-time'"):
        find_study("step-tiem", tmp_path)


def test_no_studies(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown study 'x'; there are none yet"):
        find_study("x", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STUDY.replace('"1"', "1"), 'must set VERSION to a text, e.g. VERSION = "1"'),
        ('VERSION = "1"\n', r"must define measure\(config, run, context\)"),
        ("def measure(:", "cannot be read: "),
        ("x = '\0'", "cannot be read: "),
    ],
)
def test_a_file_that_is_no_study_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    for look in (lambda: list_studies(tmp_path), lambda: find_study(str(path))):
        with pytest.raises(UsageError, match=rf"^study {path} {message}"):
            look()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("study.py", "from settings import Settings"),
        ("study.py", "import settings"),
        ("alone.py", "from settings import Settings"),
        ("alone.py", "from settings import Other as Settings"),
        ("alone.py", "import settings\nSettings = settings.Other"),
    ],
)
def test_settings_from_elsewhere_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "settings.py").write_text("class Settings: pass\nclass Other: pass\n")
    (tmp_path / name).write_text(f"{text}\n{STUDY}")
    with pytest.raises(UsageError, match=rf"{name}: define class Settings in the file"):
        find_study(str(tmp_path / name))


@pytest.mark.parametrize("value", ["0", "not True", '"no"'])
def test_a_flag_is_true_or_false(tmp_path: Path, value: str) -> None:
    (tmp_path / "mine.py").write_text(f"{STUDY}USES_PLAN = {value}\n")
    with pytest.raises(UsageError, match=r"mine\.py: USES_PLAN must be True or False"):
        find_study(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text(f"{STUDY}USES_PLAN = USES_DATA = False\n")
    found = find_study(str(tmp_path / "mine.py"))
    assert (found.uses_plan, found.uses_data, found.uses_teacher) == (False, False, True)


def test_a_link_is_called_as_it_is_here(tmp_path: Path) -> None:
    (tmp_path / "target.py").write_text(STUDY)
    (tmp_path / "link.py").symlink_to("target.py")
    (tmp_path / "below").mkdir()
    assert find_study(str(tmp_path / "link.py")).name == "link"
    assert find_study(str(tmp_path / "below" / ".." / "target.py")).name == "target"


def test_a_byte_order_mark_is_no_part_of_a_study(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"# ä\n{STUDY}", encoding="utf-8-sig")
    study = find_study(str(tmp_path / "mine.py"))
    assert load_study(study).VERSION == study.version == "1"


def test_every_word_of_the_config_is_reserved() -> None:
    words = {name for part in (Config, Plan, Workload) for name in part.model_fields}
    assert words == RESERVED


@pytest.mark.parametrize(
    "name",
    ["normality", "step_time", "train_and_eval", "plan", "seed", "data", "study_version", "layers"],
)
def test_a_study_from_outside_does_not_hide_another(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(STUDY)
    with pytest.raises(UsageError, match="rename the file"):
        find_study(str(tmp_path / f"{name}.py"))
    assert (look_up(name.replace("_", "-")) is None) == (name in RESERVED)


@pytest.mark.parametrize("name", ["a b", "a.b", "ä"])
def test_a_study_is_called_by_a_plain_word(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(STUDY)
    with pytest.raises(UsageError, match="cannot be called"):
        find_study(str(tmp_path / f"{name}.py"))


def test_a_study_from_outside_that_breaks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "breaks.py"
    path.write_text(f"{STUDY}import no_such_module\n")
    with pytest.raises(UsageError, match=r"breaks\.py cannot be imported \(ModuleNotFoundError"):
        load_study(find_study(str(path)))
    path.write_text(f"{STUDY}class Settings: pass\n")
    find_study(str(path))
    with pytest.raises(UsageError, match="Settings must be a subclass of Section"):
        settings_class("breaks")
    for name in ("no.such.module", "json.decoder.x", str(tmp_path / "nothing.py")):
        with pytest.raises(UsageError, match="no such"):
            find_study(name)


def test_every_study_here_says_what_it_asks() -> None:
    studies = list_studies()
    assert {"train-and-eval", "teacher-eval", "normality", "step-time"} < {s.name for s in studies}
    for study in studies:
        assert study.summary
        assert look_up(study.name) == study


def test_settings_say_which_inputs_are_known_by_content() -> None:
    kinds = {s.name: settings_class(s.name) for s in list_studies()}
    found = {name: inputs_of(kind) for name, kind in kinds.items() if kind is not None}
    assert found.pop("normality") == ["captured", "student"]
    assert found.pop("packed") == ["run"]
    assert set(found) == {
        *("sensitivity", "allocation", "kernels", "efficiency", "incoherence", "train-features"),
        "survival",
    }
    assert not any(found.values())
