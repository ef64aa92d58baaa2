"""Which studies exist, read from their source without importing it (or torch).

A study is a file `studies/<name>.py` or a folder `studies/<name>/` with `study.py`; its name has
dashes for underscores. A file outside works too, by its path or as `module.path`. It has

    VERSION: str            a new one makes its runs other runs
    SUMMARY: str            a line for the list of studies
    measure(config, run, context) -> list[dict]     the headline table

and may have

    RULE: str               how its verdicts follow from its numbers
    LEGEND: str             what the columns of its headline table mean; printed below it
    class Settings(Section) also in `settings.py` of a folder, where it is read without torch
    check(config) -> None   refuses what cannot be done, before a run folder is opened
    outlook(config) -> str  how much there is to do, in a line of `--dry-run`
    USES_TEACHER, USES_DATA, USES_PLAN, USES_TRAINING = False
                            what of the config must not decide which run it is
    USES_OVERRIDES = False  workload and plan are those of a run it is given; none can be set
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from robuq_bench.errors import UsageError, suggest
from robuq_bench.files import sha256_file
from robuq_bench.sections import Section

#: Keys of a config, its plan and its workload, which a study's section must not hide.
# fmt: off
RESERVED = frozenset(
    ("attention", "bits", "calibration", "data", "description", "diffusion", "evaluation", "layers",
     "model", "name", "plan", "seed", "settings", "study", "study_version", "teacher", "train",
     "training", "workload")
)
# fmt: on
FLAGS = ("USES_TEACHER", "USES_DATA", "USES_PLAN", "USES_TRAINING", "USES_OVERRIDES")

_outside: dict[str, StudyInfo] = {}


@dataclass(frozen=True)
class StudyInfo:
    """What a study's file says of itself; `settings` is the module of its `Settings`, if any."""

    name: str
    module: str
    path: Path
    version: str
    summary: str
    legend: str = ""
    settings: str | None = None
    has_check: bool = False
    has_outlook: bool = False
    is_packaged: bool = True
    uses_teacher: bool = True
    uses_data: bool = True
    uses_plan: bool = True
    uses_training: bool = True
    uses_overrides: bool = True


def studies_folder() -> Path:
    """The folder `studies`, which is installed beside this package."""
    return Path(__file__).resolve().parents[1] / "studies"


def list_studies(folder: Path | None = None) -> list[StudyInfo]:
    """Every study of `folder` (default: the packaged ones), by name."""
    folder = studies_folder() if folder is None else folder
    paths = [*folder.glob("[!_]*.py"), *folder.glob("*/study.py")]
    found = [_packaged(path) for path in paths if _is_study(path)]
    return sorted(found, key=lambda study: study.name)


def find_study(name: str, folder: Path | None = None) -> StudyInfo:
    """The study called `name`: a packaged one, a `.py` file, or `module.path` of one.

    Raises:
        UsageError: there is none (with the nearest name), or the file is no study.
    """
    if name.endswith(".py"):
        return _add_outside(Path(name), None)
    found = look_up(name, folder)
    if found is not None:
        return found
    if Path(name).is_dir():
        raise UsageError(f"study {name}: a folder; name the .py file")
    if "." in name:
        return _add_outside(_source_of(name), name)
    hint = suggest(name, [study.name for study in list_studies(folder)])
    raise UsageError(f"unknown study {name!r}{hint or '; there are none yet'}")


def look_up(name: str, folder: Path | None = None) -> StudyInfo | None:
    """The study of this name, packaged or named by its file before; None if there is none."""
    stem = name.replace("-", "_")
    folder = studies_folder() if folder is None else folder
    for path in (folder / f"{stem}.py", folder / stem / "study.py"):
        if stem.isidentifier() and path.is_file() and _is_study(path):
            return _packaged(path)
    return _outside.get(name)


def load_study(study: StudyInfo) -> ModuleType:
    """Import a study.

    Raises:
        UsageError: one from outside cannot be imported.
    """
    if study.is_packaged:
        return importlib.import_module(study.module)
    try:
        if study.module in sys.modules:
            return sys.modules[study.module]
        spec = importlib.util.spec_from_file_location(study.module, study.path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[study.module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises, with its name
        sys.modules.pop(study.module, None)
        raise UsageError(
            f"study {study.path} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    return module


def settings_class(name: str) -> type[Section] | None:
    """The `Settings` of the study called `name`; None if it has none, or is not here.

    Raises:
        UsageError: its `Settings` is no `Section`.
    """
    study = look_up(name)
    if study is None or study.settings is None:
        return None
    if study.settings == study.module:
        found = getattr(load_study(study), "Settings", None)
    else:
        found = importlib.import_module(study.settings).Settings
    if not (isinstance(found, type) and issubclass(found, Section)):
        raise UsageError(f"study {study.path}: Settings must be a subclass of Section")
    return found


def inputs_of(settings: type[Section]) -> list[str]:
    """The fields that name an input, which `<field>_sha256` identifies by content."""
    fields = settings.model_fields
    return [name for name in fields if f"{name}_sha256" in fields]


def read_study(path: Path, module: str, *, is_packaged: bool = True) -> StudyInfo:
    """Read what a study's file says of itself.

    Raises:
        UsageError: it is not Python, lacks VERSION or measure, has its `Settings` from elsewhere,
            or a flag that is neither True nor False.
    """
    body = _body(path)
    assigned = _assigned(body)
    constants = {k: v.value for k, v in assigned.items() if isinstance(v, ast.Constant)}
    version = constants.get("VERSION")
    summary, legend = constants.get("SUMMARY"), constants.get("LEGEND")
    flags: dict[str, bool] = {}
    for name in FLAGS:
        flag = constants.get(name) if name in assigned else True
        if not isinstance(flag, bool):
            raise UsageError(f"study {path}: {name} must be True or False, written out")
        flags[name] = flag
    functions = {item.name for item in body if isinstance(item, ast.FunctionDef)}
    classes = {item.name for item in body if isinstance(item, ast.ClassDef)}
    if not isinstance(version, str):
        raise UsageError(f'study {path} must set VERSION to a text, e.g. VERSION = "1"')
    if "measure" not in functions:
        raise UsageError(
            f"study {path} must define measure(config, run, context), which returns the rows of "
            "its headline table"
        )
    settings = module if "Settings" in classes else None
    beside = path.name == "study.py" and path.with_name("settings.py").is_file()
    if is_packaged and beside:
        settings = f"{module.rpartition('.')[0]}.settings"
    elif settings is None and (beside or "Settings" in _imported(body) | assigned.keys()):
        raise UsageError(f"study {path}: define class Settings in the file; it is read from there")
    stem = path.parent.name if path.name == "study.py" else path.stem
    return StudyInfo(
        name=stem.replace("_", "-"),
        module=module,
        path=path,
        version=version,
        summary=summary if isinstance(summary, str) else "",
        legend=legend if isinstance(legend, str) else "",
        settings=settings,
        has_check="check" in functions,
        has_outlook="outlook" in functions,
        is_packaged=is_packaged,
        uses_teacher=flags["USES_TEACHER"],
        uses_data=flags["USES_DATA"],
        uses_plan=flags["USES_PLAN"],
        uses_training=flags["USES_TRAINING"],
        uses_overrides=flags["USES_OVERRIDES"],
    )


def _packaged(path: Path) -> StudyInfo:
    is_folder = path.name == "study.py"
    module = f"studies.{path.parent.name}.study" if is_folder else f"studies.{path.stem}"
    return read_study(path, module)


def _is_study(path: Path) -> bool:
    """Whether a file in `studies/` means to be one, rather than to help others."""
    body = _body(path)
    names = {item.name for item in body if isinstance(item, ast.FunctionDef)}
    return "measure" in names or "VERSION" in _assigned(body)


def _add_outside(path: Path, module: str | None) -> StudyInfo:
    if not path.is_file():
        raise UsageError(f"study {path}: no such file")
    name = module or f"_study_{sha256_file(path)[:12]}"  # two files may have one name
    here = path.absolute()  # a link is called as it is here, not as what it leads to
    study = read_study(here.resolve() if ".." in here.parts else here, name, is_packaged=False)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", study.name):
        raise UsageError(
            f"study {path}: a study cannot be called {study.name!r}; rename the file, "
            "with letters, digits and underscores"
        )
    packaged = look_up(study.name)
    is_reserved = study.name.replace("-", "_") in RESERVED
    if is_reserved or (packaged is not None and packaged.is_packaged):
        taken = "a word of the config" if is_reserved else "a study of the suite"
        raise UsageError(f"study {path}: {study.name!r} is {taken}; rename the file")
    _outside[study.name] = study
    return study


def _source_of(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # whatever a package above it raises
        raise UsageError(
            f"study {module!r}: no such module ({type(error).__name__}: {error}); it must be "
            "importable from where you are, or installed"
        ) from error
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UsageError(f"study {module!r}: no such module; give the path of its .py file")
    return Path(spec.origin)


def _body(path: Path) -> list[ast.stmt]:
    try:
        return _parsed(path.read_bytes(), str(path)).body
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"study {path} cannot be read: {error}") from error


@functools.lru_cache(maxsize=32)  # resolving a config asks about one file ten times
def _parsed(source: bytes, filename: str) -> ast.Module:
    return ast.parse(source, filename=filename)


def _assigned(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """What a file sets names to, at its top level."""
    found: dict[str, ast.expr] = {}
    for item in body:
        if isinstance(item, ast.Assign):
            targets, value = item.targets, item.value
        elif isinstance(item, ast.AnnAssign) and item.value is not None:
            targets, value = [item.target], item.value
        else:
            continue
        found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def _imported(body: list[ast.stmt]) -> set[str]:
    """The names that a file imports, at its top level."""
    imports = [item for item in body if isinstance(item, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for item in imports for alias in item.names}
