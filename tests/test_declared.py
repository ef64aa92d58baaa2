"""What is declared is used: every field of a config, and every dependency."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from robuq_bench.claims.declared import Declared
from robuq_bench.config.plan import Rule
from robuq_bench.config.resolve import Config
from robuq_bench.methods import SLOTS, method_class, method_names
from robuq_bench.sections import Section
from robuq_bench.study_index import list_studies, settings_class

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "robuq_bench" / "config"
IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn"}

#: Fields that nothing outside `config/` reads, and why that is right.
READ_IN_CONFIG = {
    "TrainingConfig.sensitivity_steps": "`config.sensitivity_steps` decides, which studies call",
    "Declared.defaults": "what it holds is put into every claim that does not say it itself",
    "DiffusionConfig.beta_schedule": "its one value is what `diffusion.py` computes",
}
DIGEST = "_sha256"  # such fields identify an input, which the hash of the config does with them
#: Dependencies that nothing imports, and why they are declared.
NOT_IMPORTED: dict[str, str] = {}


@functools.cache
def syntax_trees() -> dict[Path, ast.Module]:
    folders = ("robuq_bench", "studies", "reports", "kernels")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path: ast.parse(path.read_text("utf-8")) for path in paths}


def sections(model: type[Section] = Section) -> Iterator[type[Section]]:
    for section in model.__subclasses__():
        yield section
        yield from sections(section)


def names_read(node: ast.AST) -> list[str]:
    """`x` of `a.x` and of `getattr(a, "x")`."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return [node.attr]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
        return [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
    return []


def test_every_field_of_a_config_is_read() -> None:
    read = {
        name
        for path, tree in syntax_trees().items()
        if not path.is_relative_to(CONFIG) and path.name != "settings.py"
        for node in ast.walk(tree)
        for name in names_read(node)
    }
    of_plans = {method_class(slot, name) for slot in SLOTS for name in method_names(slot)}
    of_studies = {settings_class(study.name) for study in list_studies()} - {None}
    known = set(sections())
    assert len(of_studies) > 5
    assert {Config, Rule, Declared, *of_plans, *of_studies} <= known
    unread = {
        f"{section.__name__}.{name}"
        for section in known
        for name in section.model_fields
        if section.__module__.startswith(("robuq_bench.", "studies."))
        and not name.endswith(DIGEST)
        and name not in read
    }
    assert unread == READ_IN_CONFIG.keys()


def test_every_dependency_is_imported() -> None:
    imported: set[str] = set()
    for tree in syntax_trees().values():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            imported |= {name.partition(".")[0] for name in names}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    names = {re.split(r"[<>=;\[ ]", text)[0] for text in declared}
    unused = {
        name for name in names if IMPORT_NAMES.get(name, name.replace("-", "_")) not in imported
    }
    assert unused == NOT_IMPORTED.keys()
