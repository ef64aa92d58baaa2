"""A study outside the repository: found, run, interrupted, continued, verified, and gone."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from robuq_bench.config import canonical_json, config_hash, resolve
from robuq_bench.runs.run import open_existing, run_folder
from robuq_bench.study_index import find_study

STUDY = """
from pathlib import Path
import matplotlib.pyplot as plt
from robuq_bench.sections import Digest, Ints, OptionalText, RunInput, Section
VERSION = "1"
SUMMARY = "How large are squares?"
class Settings(Section):
    roots: Ints = (1, 2, 3)
    of: RunInput = None
    of_sha256: Digest = None
    shard: OptionalText = None
def measure(config, run, context):
    for root in config.settings_of(Settings).roots:
        if not run.has(f"root/{root}"):
            if Path("stop").exists() and root == 2:
                raise KeyboardInterrupt
            run.append(f"root/{root}", kind="square", root=root, square=root**2)
    rows = [run.get(f"root/{root}") for root in config.settings.roots]
    run.write_table("squares", rows)
    run.write_table("verdicts", [{"claim": "squares grow", "verdict": "holds"}])
    plt.figure().savefig(run.figure_path("squares"))
    return rows
"""


@pytest.fixture
def own(bench: Any, tmp_path: Path) -> Path:
    """The file of a study, in the folder in which `bench` works."""
    path = tmp_path / "my_squares.py"
    path.write_text(STUDY)
    return path


def test_it_is_interrupted_once_and_continued(bench: Any, own: Path) -> None:
    Path("stop").touch()
    assert bench("study", "my_squares.py").code == 130
    Path("stop").unlink()
    outcome = bench("study", "my_squares.py", "--json")
    assert outcome.code == 0, outcome.err
    assert "continues" in outcome.err
    document = outcome.document
    assert document["run"].startswith("my-squares/a2-digits-")
    run = open_existing(Path(document["path"]))
    assert [s["status"] for s in run.manifest["sessions"]] == ["interrupted", "finished"]
    assert [row["square"] for row in document["table"]] == [1, 4, 9]
    assert len((run.path / "results.jsonl").read_text().splitlines()) == 4  # three and the headline
    for name in ("tables/squares.csv", "tables/verdicts.csv", "figures/squares.svg"):
        assert name in run.manifest["outputs"]
    with (run.path / "tables" / "squares.csv").open() as file:
        assert [row["square"] for row in csv.DictReader(file)] == ["1", "4", "9"]
    known = run.manifest["inputs"]["study"]
    assert known["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()
    again = bench("study", "my_squares.py", "--json").document
    assert again == document | {"was_complete": True}


def test_it_is_found_by_its_import_path(
    bench: Any, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = own.parent / "their_package"
    package.mkdir()
    (package / "__init__.py").touch()
    own.rename(package / "my_squares.py")
    monkeypatch.syspath_prepend(str(own.parent))
    by_path = bench("study", "their_package/my_squares.py", "--dry-run", "--json").document
    outcome = bench("study", "their_package.my_squares", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["path"] == by_path["path"]


def test_its_settings_are_flags_and_make_other_runs(bench: Any, own: Path) -> None:
    first = bench("study", "my_squares.py", "--json").document
    other = bench("study", "my_squares.py", "--set", "my-squares.roots=[5]", "--json").document
    assert [row["square"] for row in other["table"]] == [25]
    assert other["path"] != first["path"]
    Path("given").mkdir()
    Path("given/manifest.json").touch()
    Path("given/student.safetensors.sha256").write_text("0" * 64)
    flags = ["--shard", "1/2", "--checkpoint", "given", "--dry-run", "--json"]
    settings = bench("study", "my_squares.py", *flags).document["config"]["my-squares"]
    assert (settings["shard"], settings["of"], len(settings["of_sha256"])) == ("1/2", "given", 64)
    outcome = bench("study", "my_squares.py", "--set", "my-squares.rots=[5]")
    assert (outcome.code, "did you mean 'roots'" in outcome.err) == (2, True)
    outcome = bench("study", "my_squares.py", "--activations", ".")
    assert (outcome.code, "takes no --activations; normality does" in outcome.err) == (2, True)


def test_what_changed_answers_no_more(bench: Any, own: Path) -> None:
    Path("stop").touch()
    assert bench("study", "my_squares.py").code == 130
    Path("stop").unlink()
    own.write_text(STUDY.replace("root**2", "root**3"))
    outcome = bench("study", "my_squares.py")
    assert (outcome.code, "input study changed since run" in outcome.err) == (4, True)
    own.write_text(STUDY)
    assert bench("study", "my_squares.py").code == 0
    own.write_text(STUDY.replace("root**2", "root**3"))
    outcome = bench("study", "my_squares.py")
    assert (outcome.code, "raise its VERSION" in outcome.err) == (4, True)
    own.write_text(STUDY.replace("root**2", "root**3").replace('"1"', '"2"'))
    cubes = bench("study", "my_squares.py", "--json").document
    assert [row["square"] for row in cubes["table"]] == [1, 8, 27]


def test_its_runs_are_readable_when_the_file_is_gone(
    bench: Any, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = bench("study", "my_squares.py", "--json").document
    find_study("my_squares.py")
    hashed = config_hash(resolve("my-squares", "1", "a2", "digits"))
    own.unlink()
    monkeypatch.setattr("robuq_bench.study_index._outside", {})
    (row,) = bench("runs", "list", "--json").document["runs"]
    assert (row["run"], row["state"]) == (document["run"], "done")
    outcome = bench("runs", "show", document["run"])
    assert "[my-squares]\nroots = [" in outcome.out
    assert bench("runs", "show", document["run"], "--json").document["table"] == document["table"]
    assert bench("runs", "verify").code == 0
    run = open_existing(Path(document["path"]))
    assert config_hash(run.config) == hashed == run.manifest["config_sha256"]
    assert json.loads(canonical_json(run.config))["my-squares"] == {"roots": [1, 2, 3]}
    assert run_folder(Path("runs"), run.config).resolve() == run.path
    outcome = bench("study", "my_squares.py")
    assert (outcome.code, "no such file" in outcome.err) == (2, True)


def test_a_refusal_before_any_result_leaves_nothing(bench: Any, own: Path) -> None:
    refuses = "    from robuq_bench.errors import UsageError\n    raise UsageError('not here')\n"
    own.write_text(STUDY.replace("context):\n", f"context):\n{refuses}"))
    outcome = bench("study", "my_squares.py")
    assert (outcome.code, outcome.err.splitlines()[-1]) == (2, "error: not here")
    assert not Path("runs").exists()
    late = "    run.append('a', kind='a')\n"
    own.write_text(STUDY.replace("context):\n", f"context):\n{late}{refuses}"))
    assert bench("study", "my_squares.py").code == 2
    (row,) = bench("runs", "list", "--json").document["runs"]
    assert (row["state"], row["items"]) == ("stopped", 1)


REPORTED = """
from pathlib import Path
import seaborn as sns
from robuq_bench.figures import colour, panel
from robuq_bench.statistics.verdicts import Verdict, verdict_rows
VERSION = "1"
ROOTS = (1, 2, 3)
def measure(config, run, context):
    for root in ROOTS:
        if not run.has(f"root/{root}"):
            run.append(f"root/{root}", root=root, square=root**2)
            assert not Path("stop").exists()
    rows = [run.get(f"root/{root}") for root in ROOTS]
    grow = Verdict(claim="squares grow", subject="roots", verdict="holds",
                   effect=rows[-1]["square"], effect_name="greatest square", low=None, high=None,
                   n=3, n_of="roots", test="exact", p_value=None)
    run.write_table("verdicts", verdict_rows([grow], "Holds where each is above the last."))
    run.write_table("squares", rows)
    with panel("squares", "squares of roots") as drawn:
        sns.lineplot(x=ROOTS, y=[r["square"] for r in rows], ax=drawn.axes, color=colour("blue"))
    return drawn.picture.save(run.figure_path("squares")) and rows
"""


def test_twenty_lines_run_resume_and_appear_in_the_report(bench: Any, tmp_path: Path) -> None:
    assert len(REPORTED.strip().splitlines()) <= 20
    (tmp_path / "grows.py").write_text(REPORTED)
    Path("stop").touch()
    assert bench("study", "grows.py").code == 1
    Path("stop").unlink()
    outcome = bench("study", "grows.py", "--json")
    assert outcome.code == 0, outcome.err
    run = Path(outcome.document["path"])
    keys = [json.loads(line)["key"] for line in (run / "results.jsonl").read_text().splitlines()]
    assert keys == ["root/1", "root/2", "root/3", "summary"]  # the first was not measured again
    assert bench("report").code == 0
    page = Path("runs/report.html").read_text()
    assert "squares grow: holds" in page
    assert "greatest square 9; n = 3 roots; exact" in page
    assert "Holds where each is above the last." in page
    assert base64.b64encode((run / "figures/squares.svg").read_bytes()).decode() in page
    assert "Table squares: 3 rows" in page
    claims = csv.DictReader(Path("runs/report-claims.csv").read_text().splitlines())
    assert [row["verdict"] for row in claims if row["claim"] == "squares grow"] == ["holds"]


TINY = """
from typing import ClassVar
from robuq_bench.sections import Ints, OptionalInt, Section
VERSION = "1"
class Settings(Section):
    {fields}
def measure(config, run, context):
    return [{{"blocks": config.settings.blocks}}]
"""


def test_a_setting_without_a_default_has_to_be_given(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY.format(fields="blocks: int"))
    outcome = bench("study", "tiny.py")
    assert outcome.code == 2
    assert "tiny.py: Settings.blocks has no default; give --set tiny.blocks=VALUE" in outcome.err
    outcome = bench("study", "tiny.py", "--set", "tiny.blocks=3", "--json")
    assert (outcome.code, outcome.document["table"]) == (0, [{"blocks": 3}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('blocks: int = "many"', "tiny.py: default of Settings: blocks: input should be"),
        (
            'blocks: OptionalInt = None\n    LAST_STEP: ClassVar[str] = "blocks"',
            "tiny.py: LAST_STEP names Settings.blocks, which must hold a number of steps, or "
            "several; it is None",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(
    bench: Any, tmp_path: Path, fields: str, message: str
) -> None:
    (tmp_path / "tiny.py").write_text(TINY.format(fields=fields))
    outcome = bench("study", "tiny.py", "--dry-run")
    assert outcome.code == 2
    assert message in outcome.err


def test_a_list_of_one_is_written_as_a_list(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY.format(fields="blocks: Ints = (1, 2)"))
    outcome = bench("study", "tiny.py", "--set", "tiny.blocks=8")
    assert outcome.code == 2
    assert "tiny: blocks: must be a list, e.g. [8], got 8" in outcome.err
