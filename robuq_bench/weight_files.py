"""Which files a checkpoint's path means, and what a file that is no checkpoint really is.

Imports no torch: a path is looked at before anything is loaded.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from robuq_bench.errors import CheckpointError
from robuq_bench.files import sha256_bytes
from robuq_bench.runs.digests import path_digest

INDEX = ".index.json"
#: Names under which diffusers and transformers save weights, in their order of preference.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: What torch.save wrote before it wrote zip files: a pickled magic number comes first.
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_HEAD_BYTES = 1024
_UNPACK = "unpack it and name the file inside"
_AGAIN = "copy or download it again"
#: First bytes -> what the file is, and the way out.
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch them: git lfs pull"),
    (b"\x1f\x8b", "gzip-compressed", _UNPACK),
    (b"BZh", "bzip2-compressed", _UNPACK),
    (b"\xfd7zXZ\x00", "xz-compressed", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x89HDF", "an HDF5 file (Keras)", "convert it to safetensors where it was made"),
    (b"GGUF", "a GGUF file", "take the safetensors or PyTorch weights of the model"),
    (b"\x93NUMPY", "a NumPy array", "a checkpoint maps names to tensors"),
    (b"\x89PNG", "a PNG image", "name the weights"),
)


def require_file(path: Path) -> None:
    """Raise CheckpointError unless `path` is a file."""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if not is_file:
        problem = "is a folder; name the file" if is_folder else "does not exist"
        raise CheckpointError(f"checkpoint {path} {problem}")


def checkpoint_files(path: Path) -> list[Path]:
    """The weight files that `path` stands for, none of which is opened.

    A file stands for itself, an index (`*.index.json`) for its shards, and a folder of diffusers'
    or transformers' `save_pretrained` for the weights in it; that of a whole pipeline for its
    `transformer`.

    Raises:
        CheckpointError: nothing is there, it cannot be read, or a folder does not say which file
            is meant.
    """
    try:
        return _files_of(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return _shards(path) if path.name.endswith(INDEX) else [path]
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if (path / "model_index.json").is_file() and (path / "transformer").is_dir():
        return _files_of(path / "transformer")
    names = [f"{stem}{suffix}" for suffix in _SUFFIXES for stem in _STEMS]
    for name in names:
        whole, index = path / name, path / f"{name}{INDEX}"
        if whole.is_file() and index.is_file():
            raise CheckpointError(
                f"checkpoint {path} is a folder with both {name} and {index.name}; name one of them"
            )
        if whole.is_file() or index.is_file():
            return _files_of(whole if whole.is_file() else index)
    found = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS)
    there = f"{', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
    raise CheckpointError(
        f"checkpoint {path} is a folder without {names[0]} or the like; "
        + (f"name one of its files: {there}" if found else "it holds no weights: name their file")
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"checkpoint {index} is no index of shards (a JSON object with a weight_map); {_AGAIN}"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"checkpoint {index} names {name!r}, not a file beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"checkpoint {index} names {len(names)} shards, of which {len(missing)} are missing: "
            f"{', '.join(missing[:3])}; {_AGAIN}"
        )
    return [index.parent / name for name in names]


def checkpoint_digest(path: Path) -> str:
    """SHA-256 of a checkpoint: of its file, or over names and digests of its shards.

    Raises:
        CheckpointError: as `checkpoint_files`, or a file cannot be read.
    """
    files = checkpoint_files(path)
    digests = [path_digest(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = [f"{digest}  {file.name}\n" for file, digest in zip(files, digests, strict=True)]
    return sha256_bytes("".join(lines).encode())


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then a JSON object."""
    head = _head(path)
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def refuse_other_kinds(path: Path) -> None:
    """Raise CheckpointError when a file is clearly no checkpoint; says what it is, and the way out.

    Whatever else is wrong with it is for its reader to find.
    """
    found = _other_kind(path)
    if found is not None:
        raise CheckpointError(f"checkpoint {path} was refused: it is {found[0]}; {found[1]}")


def _other_kind(path: Path) -> tuple[str, str] | None:
    head = _head(path)
    if not head:
        return "empty", _AGAIN
    if is_safetensors(path) or head.startswith(_TORCH_MAGIC):
        return None
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), not the weights", (
            "the address gave a page: download the file itself, signed in where that is needed"
        )
    if text.startswith((b"<?xml", b"{", b"[{")):
        kind = "XML" if text.startswith(b"<") else "JSON"
        return f"{kind} text, such as a server's error message", "download the weights again"
    for signature, kind, way_out in _SIGNATURES:
        if head.startswith(signature):
            return kind, way_out
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a plain pickle, not written by torch.save, and may hold more than tensors", (
            "save the state dict with torch.save or as safetensors where it was made"
        )
    return None


def _kind_of_zip(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None  # cut off: its reader says so
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive", "save the module's state_dict() where it was made"
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)", "a checkpoint is safetensors or written by torch.save"
    return f"a zip archive with {', '.join(names[:3]) or 'nothing'} in it", _UNPACK


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
