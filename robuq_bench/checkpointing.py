"""Tensors on disk: safetensors with a SHA-256 beside them, written atomically, verified on load.

Neither `.pt` nor safetensors notices a flipped bit, so every file `<name>.safetensors` has a
sidecar `<name>.safetensors.sha256` in the format of `sha256sum` (`sha256sum -c` checks it).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robuq_bench.errors import CheckpointError
from robuq_bench.files import (
    atomic_write_text,
    output_error,
    read_checksums,
    remove_temporaries,
    replacing,
    sha256_file,
)
from robuq_bench.weight_files import (
    checkpoint_digest,
    checkpoint_files,
    is_safetensors,
    refuse_other_kinds,
    require_file,
)

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)
_METADATA_KEY = "robuq_bench"
#: Where training scripts keep a state dict, moving averages first.
_STATE_KEYS = (
    "ema",
    "ema_state_dict",
    "model_ema",
    "state_dict_ema",
    "params_ema",
    "model",
    "model_state_dict",
    "state_dict",
    "module",
    "net",
    "params",
    "student",
)
_MAX_NESTING = 4


def sidecar_path(path: Path) -> Path:
    """Return where the SHA-256 of `path` is kept."""
    return path.with_name(path.name + ".sha256")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write named tensors (any shape, dtype and device) atomically, with their SHA-256 beside them.

    Equal tensors and metadata give an equal file, byte for byte. A kill at any instant leaves a
    loadable pair: while the file is being replaced the sidecar lists the old and the new digest.

    Returns:
        The SHA-256 of the file, 64 hex digits.

    Raises:
        RobuqError: the folder cannot be written or is full; an older `path` stays loadable.
        TypeError: `metadata` is not a map of strings to strings.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if any(not isinstance(item, str) for pair in metadata.items() for item in pair):
        raise TypeError("checkpoint metadata must map str to str")
    # One key, sorted inside: safetensors orders several keys at random, and with them the bytes.
    header = {_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)}
    sidecar = sidecar_path(path)
    with replacing(path) as temporary:
        # In a folder of its own, because safetensors makes a temporary file beside its target.
        temporary.mkdir()
        prepared = temporary / path.name
        try:
            save_file(_storable(tensors), prepared, metadata=header)
        except SafetensorError as error:
            raise output_error(path, _as_os_error(error)) from error
        prepared.chmod(0o644)  # safetensors creates it readable by its owner alone
        digest = sha256_file(prepared)
        replaced = [known for known in _known_digests(path) if known != digest]
        _write_sidecar(sidecar, path.name, [digest, *replaced])
    if replaced:
        _write_sidecar(sidecar, path.name, [digest])
    return digest


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors; copies where names share memory, which the format forbids."""
    storable: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        storable[name] = tensor.clone() if address in storages else tensor
        storages.add(address)
    return storable


def _as_os_error(error: Exception) -> OSError | str:
    """Recover the errno that safetensors' Rust writer mentions only in its message."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else str(error)


def _known_digests(path: Path) -> list[str]:
    """Return the digests under which an existing `path` loads; none if it does not load anyway."""
    try:
        return read_checksums(sidecar_path(path)) if path.exists() else []
    except (OSError, ValueError):
        return []


def _write_sidecar(sidecar: Path, name: str, digests: list[str]) -> None:
    atomic_write_text(sidecar, "".join(f"{digest}  {name}\n" for digest in digests))


def load_tensors(
    path: Path, *, expected_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote, after checking its SHA-256.

    Args:
        path: a `.safetensors` file.
        expected_sha256: the digest to check instead of the sidecar's; empty counts as not given.

    Returns:
        The tensors by name, on the CPU (memory-mapped privately: changing them does not change the
        file), and the metadata.

    Raises:
        CheckpointError: the file or its sidecar is missing, unreadable, truncated or changed.
    """
    _verify_digest(path, expected_sha256)
    return read_safetensors(path)


def verify_tensors(path: Path) -> None:
    """Check a file against its sidecar without reading the tensors (imports no torch).

    Raises:
        CheckpointError: as `load_tensors`.
    """
    _verify_digest(path, None)


def _verify_digest(path: Path, expected_sha256: str | None) -> None:
    require_file(path)
    sidecar = sidecar_path(path)
    try:
        known = [expected_sha256.lower()] if expected_sha256 else read_checksums(sidecar)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be verified: its SHA-256 file {sidecar.name} is missing"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be verified: {error}") from error
    try:
        actual = sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if actual not in known:
        raise CheckpointError(
            f"checkpoint {path} is damaged or not the expected file: its SHA-256 is {actual}, "
            f"expected {known[0]}"
        )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata without checking a SHA-256; `load_tensors` does both.

    Raises:
        CheckpointError: the file is missing or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    require_file(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            metadata: Any = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if _METADATA_KEY in metadata:
            metadata = json.loads(metadata[_METADATA_KEY])
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        refuse_other_kinds(path)
        what = "damaged or cut off" if is_safetensors(path) else "no safetensors file"
        raise CheckpointError(f"checkpoint {path} is {what}; copy or download it again") from error
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"checkpoint {path} is damaged: its metadata is not text by name")
    return tensors, metadata


class CheckpointStore:
    """The newest checkpoints of one training run, as `step-00000500.safetensors` files.

    One process writes a store at a time (a run's lock sees to that).
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Use `folder` (created on the first save) and keep the `keep` newest checkpoints."""
        if keep < 1:
            raise ValueError("keep must be at least 1")
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps that have a file, ascending; none of them is verified."""
        names = (
            re.fullmatch(r"step-(\d+)\.safetensors", p.name) for p in self.folder.glob("step-*")
        )
        return sorted(int(found[1]) for found in names if found)

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """Save a checkpoint, then delete those no longer needed.

        Those are all but the `keep` newest, and any of a later step: they belong to a course of
        training that the caller went back on, and must not be what the next resume picks up.

        Raises:
            RobuqError: the folder cannot be written or is full; earlier checkpoints are intact.
        """
        if self.folder.is_dir():
            remove_temporaries(self.folder)
        path = self.path(step)
        save_tensors(path, tensors, metadata)
        kept = [known for known in self.steps() if known <= step][-self.keep :]
        self._prune({self.path(known).name for known in kept})
        return path

    def clear(self) -> None:
        """Delete every checkpoint; RobuqError if one cannot be."""
        self._prune(set())

    def _prune(self, kept: set[str]) -> None:
        for path in sorted(self.folder.glob("step-*.safetensors*")):
            if path.name.removesuffix(".sha256") not in kept:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise output_error(path, error) from error

    def load_latest(
        self, at_most: int | None = None
    ) -> tuple[int, dict[str, Tensor], dict[str, str]] | None:
        """Return (step, tensors, metadata) of the newest loadable checkpoint, None if none exists.

        A damaged one is skipped with a warning through `logging`; with `at_most`, so are later
        steps, silently.

        Raises:
            CheckpointError: checkpoints exist, but all of them are damaged.
        """
        problems: list[CheckpointError] = []
        for step in reversed(self.steps()):
            if at_most is not None and step > at_most:
                continue
            try:
                tensors, metadata = load_tensors(self.path(step))
            except CheckpointError as error:
                _LOG.warning("%s; trying the checkpoint before it", error)
                problems.append(error)
            else:
                return step, tensors, metadata
        if problems:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; start again with --force. "
                + "; ".join(map(str, problems))
            )
        return None


def load_untrusted_checkpoint(
    path: Path, *, expected_sha256: str | None = None
) -> dict[str, Tensor]:
    """Read a state dict from somebody else's checkpoint without running code.

    It is safetensors, under any name, or what torch.save wrote. Pickles go through torch's
    `weights_only` loader, which builds tensors and plain containers alone; `argparse.Namespace` is
    allowed besides, because DiT's training script stores its arguments. Of a training checkpoint
    the moving average is taken where it has one: what is under the first of `ema`, `model_ema`,
    ..., `model`, `state_dict`, ... at most four levels down, else the file's own mapping.

    Args:
        path: the file, an index of shards, or a folder of `save_pretrained`; see
            `checkpoint_files`. A `.sha256` sidecar is checked where a file has one.
        expected_sha256: the digest that `checkpoint_digest` must give; empty counts as not given.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        CheckpointError: missing, truncated, changed, not a state dict, asking to run code, or
            another kind of file, which is named.
    """
    files = checkpoint_files(path)
    for file in files:
        refuse_other_kinds(file)
        # A stated digest may have been taken of a file that was damaged already: both count.
        if sidecar_path(file).exists():
            _verify_digest(file, None)
    if expected_sha256 and (actual := checkpoint_digest(path)) != expected_sha256.lower():
        raise CheckpointError(
            f"checkpoint {path} is damaged or not the expected file: its SHA-256 is {actual}, "
            f"expected {expected_sha256}"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        part = read_safetensors(file)[0] if is_safetensors(file) else None
        part = _state_dict(file, _load_pickle(file)) if part is None else part
        repeated = sorted(part.keys() & state.keys())
        if repeated:
            raise CheckpointError(f"checkpoint {path}: two shards hold {repeated[0]!r}")
        state |= part
    return state


def _load_pickle(path: Path) -> object:
    import torch

    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise CheckpointError(
            f"checkpoint {path} is damaged or no safetensors file; copy or download it again, or "
            "rename it to .pt if torch.save wrote it"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Only the zip format, torch's default since 1.6, can be mapped instead of read.
            mappable = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a hostile or cut-off pickle can raise anything
        # torch's own words advise to load without the protection, so none of them are shown.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = "it is damaged or cut off, or holds more than tensors and plain containers"
        if asked:
            reason = f"it holds more than tensors: it asks for {asked[1]}, which could run code"
        raise CheckpointError(
            f"checkpoint {path} was refused: {reason}. Copy it again, or save its state dict alone "
            "where it was made: torch.save(model.state_dict(), FILE), or safetensors"
        ) from None


def _state_dict(path: Path, content: object) -> dict[str, Tensor]:
    from torch import Tensor

    for _ in range(_MAX_NESTING):
        if not isinstance(content, Mapping) or not content:
            break
        if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
        nested = (content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping))
        inner = next(nested, None)
        if inner is None:
            break
        content = inner
    raise CheckpointError(
        f"checkpoint {path} holds no state dict (a map of names to tensors, bare or under one of "
        f"{', '.join(_STATE_KEYS)}), but {_summary(content)}; save the state dict alone"
    )


def _summary(content: object) -> str:
    """What was found in place of a state dict: the entries that are no tensors, with their type."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    others = [
        f"{key} ({type(value).__name__})"
        for key, value in content.items()
        if type(value).__name__ not in ("Tensor", "Parameter")
    ]
    return f"entries that are no tensors: {', '.join(others[:5])}" if others else "nothing"
