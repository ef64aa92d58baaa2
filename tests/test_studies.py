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


#: Where what serves every study names one after all -> which, and why.
NAMED = {
    "robuq_bench/config/resolve.py": {"train-and-eval"},  # hashes that its old runs have
    "robuq_bench/config/older.py": {  # sections that every config had, before studies owned them
        "allocation", "efficiency", "kernels", "normality", "packed", "sensitivity"
    },
    # commands of their own
    "robuq_bench/cli/app.py": {"train-and-eval", "train-features", "train-teacher"},
    "robuq_bench/cli/packed.py": {"packed"},  # the command that describes a packed file
    "robuq_bench/config/workload.py": {"train-features"},  # an error's way out
    "robuq_bench/runs/provenance.py": {"kernels"},  # the folder of that name
}  # fmt: skip


def named_in(path: Path) -> set[str]:
    """The studies that a file names: as a whole string, or with a dash within one."""
    tree = ast.parse(path.read_text("utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = {ast.get_docstring(n, False) for n in ast.walk(tree) if isinstance(n, documented)}
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} - prose
    names = {study.name for study in list_studies()}
    return {
        name
        for name in names
        for text in texts
        if isinstance(text, str) and (name == text or ("-" in name and name in text))
    }


def test_what_serves_every_study_names_none() -> None:
    root = FOLDER.parent
    shared = [path for name in ("config", "cli", "runs") for path in
              (root / "robuq_bench" / name).rglob("*.py")]  # fmt: skip
    shared += [root / "robuq_bench" / "study_index.py", root / "reports" / "builder.py"]
    found = {path.relative_to(root).as_posix(): named_in(path) for path in shared}
    assert {path: names for path, names in found.items() if names} == NAMED
