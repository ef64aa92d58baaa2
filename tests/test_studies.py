"""A study owns itself: nothing of it lies elsewhere, and it is read in one sitting."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from robuq_bench.study_index import list_studies, studies_folder

FOLDER = studies_folder()
MOST_MODULES = 4  # in a chain of imports


def modules() -> dict[str, Path]:
    """Modules of `studies` by name, packages left out."""
    paths = (path for path in FOLDER.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(FOLDER.parent).with_suffix("").parts): path for path in paths}


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of `studies` that a module names, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(modules()[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found & modules().keys())


def chain(name: str) -> list[str]:
    """The longest chain of imports within `studies` that begins with a module."""
    return [name, *max(map(chain, imports(name)), key=len, default=[])]


def test_every_file_belongs_to_one_study() -> None:
    owners = {study.module: study.name for study in list_studies()}
    for name, path in modules().items():
        owner = name if path.parent == FOLDER else f"studies.{path.parent.name}.study"
        assert owner in owners
    for path in FOLDER.rglob("__init__.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 1


def test_no_study_spans_more_than_its_folder() -> None:
    for name, path in modules().items():
        others = {modules()[other] for other in imports(name)}
        assert all(other.parent == path.parent != FOLDER for other in others), name


def test_a_study_is_read_in_few_steps() -> None:
    longest = max(map(chain, modules()), key=len)
    assert 2 <= len(longest) <= MOST_MODULES, longest


def test_nothing_else_names_a_study_by_its_module() -> None:
    shipped = [
        path
        for root in ("robuq_bench", "reports", "kernels")
        for path in (FOLDER.parent / root).rglob("*.py")
    ]
    for path in shipped:
        text = path.read_text("utf-8")
        assert not any(name in text for name in modules()), path
