"""What a config names by path, identified by content: digests are filled in where files are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from robuq_bench.config.files import asset_path
from robuq_bench.config.workload import feature_names
from robuq_bench.data.files import SOURCES, data_digest, data_path, data_variable
from robuq_bench.errors import CheckpointError, ConfigError, RobuqError
from robuq_bench.files import read_checksums, sha256_bytes
from robuq_bench.runs.digests import path_digest, walk
from robuq_bench.sections import none_word
from robuq_bench.weight_files import checkpoint_digest

# Fields of `workload.evaluation` that name an input; `<field>_sha256` identifies it.
INPUTS_OF_EVALUATION = ("features", "reference", "second_features", "second_reference", "vae")


def identify(section: dict[str, Any], path_key: str) -> None:
    """Fill in the SHA-256 of the file a section names, when it is here and none was given."""
    spec = none_word(section[path_key])
    if not spec or not isinstance(spec, str) or none_word(section.get("sha256")):
        return
    path = asset_path(spec)
    try:
        if path_key == "checkpoint" and path.exists():  # may be a folder or an index of shards
            section["sha256"] = checkpoint_digest(path)
        elif path.is_file():
            section["sha256"] = path_digest(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RobuqError as error:
        raise ConfigError(str(error)) from None


def identify_data(workload: dict[str, Any]) -> None:
    """Fill in the digest of the data files, where any are named; embedded data have none.

    What cannot be read gets "" here, so that it is no finished run's, and an error when it is
    loaded: commands that need no data must not fail for it.
    """
    data = workload["data"]
    source, text, name = data["source"], none_word(data["path"]), workload["name"]
    invalid = (
        str(source) not in SOURCES or not isinstance(text, str | None) or not isinstance(name, str)
    )
    if invalid or none_word(data["sha256"]) or not (text or os.environ.get(data_variable(name))):
        return
    try:
        data["sha256"] = data_digest(source, data_path(source, text, name))
    except RobuqError:
        data["sha256"] = ""


def identify_evaluation(evaluation: dict[str, Any]) -> None:
    """The same for the files that samples are judged with."""
    for path_key in INPUTS_OF_EVALUATION:
        spec, digest_key = none_word(evaluation[path_key]), f"{path_key}_sha256"
        known = none_word(evaluation[digest_key])
        if not spec or not isinstance(spec, str) or known or spec in feature_names():
            continue
        try:
            path = asset_path(spec)
            evaluation[digest_key] = path_digest(path) if os.path.exists(path) else ""
        except RobuqError:
            evaluation[digest_key] = ""


def identify_input(settings: dict[str, Any], path_key: str) -> None:
    """The same for the input of a study, which may be a folder."""
    spec = none_word(settings.get(path_key))
    if not spec or not isinstance(spec, str) or none_word(settings[f"{path_key}_sha256"]):
        return
    path = asset_path(spec)
    if os.path.isdir(path):
        settings[f"{path_key}_sha256"] = folder_digest(path)
    elif os.path.isfile(path):
        holder = {"path": spec, "sha256": ""}
        identify(holder, "path")
        settings[f"{path_key}_sha256"] = holder["sha256"]


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of every checksum file (*.sha256) below a folder.

    Links are followed, and what is hidden is left out, as `digests.walk` does.

    Raises:
        ConfigError: there are none, or a file is not what the checksum beside it says.
        RobuqError: a link leads nowhere or to a folder above it.
    """
    try:
        found = sorted(path for path in walk(folder) if path.suffix == ".sha256")
        if not found:
            raise ConfigError(f"{folder}: holds no safetensors files with checksums (*.sha256)")
        texts = [path.read_bytes() for path in found]
        for path in found:
            file = path.with_suffix("")
            if file.is_file() and path_digest(file) not in read_checksums(path):
                raise ConfigError(f"{file}: differs from its checksum {path.name}; copy it anew")
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except (CheckpointError, ValueError) as error:
        raise ConfigError(f"{folder}: {error}") from None
    names = [os.fsencode(path.relative_to(folder).as_posix()) for path in found]
    return sha256_bytes(b"".join(b"%s\n%s" % pair for pair in zip(names, texts, strict=True)))
