"""Which studies exist, read from their source without importing it (or torch).

A study is a file in `studies/` with `VERSION: str`, `SUMMARY: str` and a function
`run(config, run, context)`; its name is the file's, with dashes.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from robuq_bench.errors import RobuqError, UsageError, suggest

# These have commands of their own.
COMMAND_MODULES = frozenset(
    {
        "export_packed",
        "sample_images",
        "teacher_eval",
        "train_and_eval",
        "train_features",
        "train_teacher",
    }
)


@dataclass(frozen=True)
class StudyInfo:
    """What a study's file says of itself; a changed `version` makes its runs other runs."""

    name: str
    module: str
    version: str
    summary: str
    has_run: bool


def studies_folder() -> Path:
    """The folder `studies`, which is installed beside this package."""
    return Path(__file__).resolve().parents[1] / "studies"


def read_study(path: Path) -> StudyInfo:
    """Read `VERSION` and `SUMMARY` of one file; RobuqError when it is not Python or has neither."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise RobuqError(f"study {path} cannot be read: {error}") from error
    texts: dict[str, str] = {}
    for statement in body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        else:
            continue
        if (
            isinstance(target, ast.Name)
            and isinstance(value, ast.Constant)
            and isinstance(value.value, str)
        ):
            texts[target.id] = value.value
    has_run = any(isinstance(item, ast.FunctionDef) and item.name == "run" for item in body)
    if "VERSION" not in texts and (has_run or path.stem in COMMAND_MODULES):
        raise RobuqError(f'study {path} must set VERSION to a text, e.g. VERSION = "1"')
    return StudyInfo(
        name=path.stem.replace("_", "-"),
        module=f"studies.{path.stem}",
        version=texts.get("VERSION", ""),
        summary=texts.get("SUMMARY", ""),
        has_run=has_run,
    )


def list_studies(folder: Path | None = None) -> list[StudyInfo]:
    """Every study that `study NAME` can run, by name."""
    folder = studies_folder() if folder is None else folder
    paths = sorted(folder.glob("[!_]*.py"))
    found = [read_study(path) for path in paths if path.stem not in COMMAND_MODULES]
    return [study for study in found if study.has_run]


def find_study(name: str, folder: Path | None = None) -> StudyInfo:
    """Return the study called `name`; UsageError with the nearest name otherwise."""
    studies = {study.name: study for study in list_studies(folder)}
    if name in studies:
        return studies[name]
    if name.replace("_", "-") in studies:
        return studies[name.replace("_", "-")]
    hint = suggest(name, studies) or "; there are none yet"
    raise UsageError(f"unknown study {name!r}{hint}")


def command_version(module: str) -> str:
    """VERSION of a module of `studies/` that has its own command, e.g. 'train_and_eval'."""
    return read_study(studies_folder() / f"{module}.py").version
