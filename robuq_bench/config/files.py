"""TOML files to `Plan` and `Workload`, with errors that name the file, the key and the way out."""

from __future__ import annotations

import csv
import difflib
import json
import logging
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from robuq_bench.config.older import NEW_NAMES, is_old, modern_plan, old_keys
from robuq_bench.config.plan import BitsConfig, Plan, Rule
from robuq_bench.config.workload import Workload
from robuq_bench.errors import ConfigError, suggest
from robuq_bench.files import expand_user, read_text, sha256_file
from robuq_bench.methods import SLOTS

PACKAGE = Path(__file__).resolve().parents[1]
ASSET_PREFIX = "asset:"

_LOG = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=BaseModel)
Table = dict[str, Any]


def asset_path(spec: str) -> Path:
    """Return the file that `spec` means: 'asset:NAME' is shipped with the package, else a path."""
    if spec.startswith(ASSET_PREFIX):
        return PACKAGE / "assets" / spec.removeprefix(ASSET_PREFIX)
    return expand_user(spec)


def plan_names() -> list[str]:
    """Names of the packaged plans, sorted."""
    return _packaged("plan")


def workload_names() -> list[str]:
    """Names of the packaged workloads, sorted."""
    return _packaged("workload")


def load_plan(name_or_path: str | Path) -> Plan:
    """Load a packaged plan by name, or a TOML file by path.

    Raises:
        ConfigError: no such plan, unreadable file, unknown key or invalid value.
    """
    return _load(Plan, "plan", name_or_path)


def load_workload(name_or_path: str | Path) -> Workload:
    """Load a packaged workload by name, or a TOML file by path; raises as `load_plan`."""
    return _load(Workload, "workload", name_or_path)


def load_allocation_file(allocation: BitsConfig, layers: Iterable[str]) -> dict[str, int]:
    """Read bits per layer from `bits.path`, for exactly the layers named in `layers`.

    The file is JSON or TOML, {layer: bits} or that as `bits_by_layer` among other entries (as
    `save_allocation` writes), or a CSV with columns `layer` and `bits`, such as a run's
    tables/allocation.csv.

    Raises:
        ConfigError: unreadable file, changed since the config was resolved, missing or unknown
            layer, or bits outside 1 to 8.
    """
    path = expand_user(allocation.path or "")
    try:
        if allocation.sha256 and sha256_file(path) != allocation.sha256:
            raise ConfigError(f"{path}: changed since this run was planned; start the run again")
        bits_by_layer = _parse_allocation(path, allocation.of)
    except OSError as error:
        raise ConfigError(f"allocation file {path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"allocation file {path}: neither JSON or TOML {{layer: bits}} nor a CSV with columns "
            f"layer and bits ({error})"
        ) from None
    wanted = list(layers)
    for name, bits in bits_by_layer.items():
        if name not in wanted:
            raise ConfigError(f"{path}: unknown layer {name!r}{suggest(name, wanted)}")
        if type(bits) is not int or not 1 <= bits <= 8:
            raise ConfigError(f"{path}: {name}: bits must be 1 to 8, got {bits!r}")
    missing = [name for name in wanted if name not in bits_by_layer]
    if missing:
        raise ConfigError(f"{path}: no bits for {len(missing)} layers, first {missing[0]!r}")
    return {name: bits_by_layer[name] for name in wanted}


def _parse_allocation(path: Path, of: str) -> dict[str, int]:
    text = read_text(path)
    if path.suffix == ".csv":
        header = text.partition("\n")[0]
        delimiter = next((mark for mark in ",;\t" if mark in header), ",")  # Excel's, by its locale
        rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter))
        for row in rows:
            if row.get("of", of) != of:
                raise ValueError(f"it holds bits of {row['of']}s, and the plan asks for {of}s")
        return _without_repeats([(row["layer"], int(row["bits"])) for row in rows])
    if path.suffix == ".toml":
        values: Any = parse_toml(text)
    else:
        values = json.loads(text, object_pairs_hook=_without_repeats)
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}")
    return dict(values.get("bits_by_layer", values))


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is named twice")
    return found


def parse_toml(text: str) -> Table:
    """Return what TOML `text` says.

    Raises:
        ValueError: it is not TOML, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def validate(model: type[ModelT], values: Mapping[str, Any], origin: str) -> ModelT:
    """Validate `values`, turning every pydantic complaint into one `ConfigError`."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        items = error.errors(include_url=False)
        lines = [_explain(model, item, origin, values) for item in items]
        raise ConfigError("\n".join(lines)) from None


def keys_of(model: type[BaseModel]) -> list[str]:
    """Dotted names of every leaf field of a model, e.g. 'attention.matmul_bits'."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        keys += [name] if section is None else [f"{name}.{key}" for key in keys_of(section)]
    return keys


def sections_of(model: type[BaseModel]) -> list[str]:
    """Dotted names of every section of a model, e.g. 'teacher.training'."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            names += [name, *(f"{name}.{inner}" for inner in sections_of(section))]
    return names


def _packaged(kind: str) -> list[str]:
    return sorted(path.stem for path in (PACKAGE / f"{kind}s").glob("*.toml"))


def _locate(kind: str, name_or_path: str | Path, folder: Path | None = None) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        path = expand_user(name_or_path)
        path = path if folder is None else folder / path
        if not path.is_file():
            raise ConfigError(f"{kind} file not found: {path}")
        return path
    names = _packaged(kind)
    if text not in names:
        raise ConfigError(
            f"unknown {kind} {text!r}{suggest(text, names)} "
            f"(list them with `{kind}s`, or give a path to a .toml file)"
        )
    return PACKAGE / f"{kind}s" / f"{text}.toml"


def _read(path: Path) -> Table:
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return _in_todays_schema(path, values) if is_old(values) else values


def _in_todays_schema(path: Path, values: Table) -> Table:
    """A plan file in the schema before [[layers]]; one that overrides another cannot be read so."""
    if "extends" in values:
        lines = [f"{key} is now {NEW_NAMES.get(key, 'in [[layers]]')}" for key in old_keys(values)]
        raise ConfigError(
            f"{path}: is in the schema before [[layers]], and extends another plan; write it "
            f"anew (see docs/plans.md):\n  " + "\n  ".join(lines)
        )
    _LOG.warning("%s: is in the schema before [[layers]]; read as what `plans` shows", path)
    try:
        return modern_plan(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: in the schema before [[layers]]: {error}") from None


def _load(model: type[ModelT], kind: str, name_or_path: str | Path) -> ModelT:
    chain = _chain(kind, _locate(kind, name_or_path))
    inherited: Table = {}
    # From the last base on: each is checked alone, so that its mistakes are not blamed on others.
    for path, own in reversed(chain[1:]):
        values = merge(inherited, own)
        validate(model, {"name": path.stem, **values}, str(path))
        # Only the base's settings are inherited, not what it is called.
        inherited = {k: v for k, v in values.items() if k not in ("name", "description")}
    path, own = chain[0]
    return validate(model, {"name": path.stem, **merge(inherited, own)}, str(path))


def _chain(kind: str, path: Path) -> list[tuple[Path, Table]]:
    """A file and the ones it extends, nearest first, each with what it says itself."""
    chain: list[tuple[Path, Table]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            circle = [file for file, _ in chain[seen.index(path.resolve()) :]]
            raise ConfigError(
                f"{chain[-1][0]}: extends goes in a circle: "
                f"{' -> '.join(map(str, [*circle, circle[0]]))}; one of them must extend nothing"
            )
        values = _read(path)
        base = values.pop("extends", None)
        chain.append((path, values))
        seen.append(path.resolve())
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends must be the name or path of one {kind}")
        try:
            path = _locate(kind, base, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: extends: {error}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """Return `base` updated by `over`, section by section and key by key.

    Rules of `layers` are merged by their names; new ones go in front, where they come first. A
    digest belongs to the file it was given for, `at_width` to the rank it was given for, and
    parameters to their method: where `over` names another, `base`'s are dropped.
    """
    if isinstance(over.get("method"), str) and over["method"] != base.get("method"):
        return dict(over)
    stale = {f"{key}_sha256" for key in over}
    stale |= {"sha256"} if over.keys() & {"path", "checkpoint", "source"} else set()
    stale |= {"at_width"} if "rank" in over else set()
    merged = {key: value for key, value in base.items() if key not in stale or key in over}
    for key, value in over.items():
        below = merged.get(key)
        if key in SLOTS:  # a method's name is short for a table of nothing else
            below, value = as_table(below), as_table(value)
        if key == "layers" and isinstance(below, list) and isinstance(value, list):
            merged[key] = _merge_rules(below, value)
        elif isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def as_table(value: Any) -> Any:
    """The table that a slot's value means, where it is the name of a method."""
    return {"method": value} if isinstance(value, str) and value != "none" else value


def _named(rule: Any) -> Any:
    """A rule with the name it has without one."""
    is_unnamed = isinstance(rule, Mapping) and "name" not in rule
    return {"name": Rule.model_fields["name"].default, **rule} if is_unnamed else rule


def _merge_rules(base: list[Any], over: list[Any]) -> list[Any]:
    changes: dict[str, Mapping[str, Any]] = {}
    base = [_named(rule) for rule in base]
    over = [_named(rule) for rule in over]
    known = {rule.get("name") for rule in base}
    new: list[Any] = []
    for rule in over:
        name = rule.get("name") if isinstance(rule, Mapping) else None
        if isinstance(name, str) and name in known and name not in changes:
            changes[name] = rule
        else:  # also a second of one name, which the plan then refuses
            new.append(rule)
    return [*new, *(merge(rule, changes.get(rule.get("name"), {})) for rule in base)]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also one that may be absent; None for other fields."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _explain(model: type[BaseModel], error: Any, origin: str, values: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"] if part != "function-before"]
    key = ".".join(_with_names(location, values))
    prefix = f"{origin}: {key}: " if key else f"{origin}: "
    if error["type"] == "extra_forbidden":
        return f"{prefix}unknown key{nearest_key(model, location)}"
    if error["type"] == "missing":
        return f"{prefix}missing; add it"
    if error["type"] == "value_error":
        return prefix + str(error["ctx"]["error"])
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"]
        return f"{prefix}{error['input']!r} is not one of {expected}{_near(error)}"
    if error["type"] == "model_type":
        return f"{prefix}must be a section [{key}], got {error['input']!r}"
    if error["type"] == "tuple_type" and not isinstance(error["input"], Mapping):
        return f"{prefix}must be a list, e.g. {[error['input']]}, got {error['input']!r}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{prefix}{message}, got {error['input']!r}"


def _with_names(location: list[str], values: Any) -> list[str]:
    """A place in `values` with what its tables are called instead of their numbers.

    So it is `layers.block.weight`, which is also what `--set` calls it.
    """
    named: list[str] = []
    for part in location:
        inner = None
        if isinstance(values, Mapping):
            inner = values.get(part)
        elif isinstance(values, list | tuple) and part.isdigit() and int(part) < len(values):
            inner = values[int(part)]
            name = inner.get("name") if isinstance(inner, Mapping) else None
            part = name if isinstance(name, str) and name else part
        named.append(part)
        values = inner
    return named


def _near(error: Any) -> str:
    choices = [part.strip().strip("'") for part in _split(error["ctx"]["expected"])]
    hint = suggest(str(error["input"]), choices)
    return hint if hint.startswith("; did") else ""


def _split(expected: str) -> Iterable[str]:
    return expected.replace(" or ", ", ").split(",")


def nearest_key(model: type[BaseModel], location: list[str]) -> str:
    """Message suffix with the nearest valid key for the unknown key at `location`."""
    scope: type[BaseModel] = model
    for part in location[:-1]:
        field = scope.model_fields.get(part)
        section = None if field is None else section_of(field.annotation)
        if section is None:
            break
        scope = section
    here = list(scope.model_fields) + (["extends"] if scope is model else [])
    elsewhere = [key for key in keys_of(model) if key.rpartition(".")[2] == location[-1]]
    if elsewhere and not difflib.get_close_matches(location[-1], here, n=1, cutoff=0.8):
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    return suggest(location[-1], here)
