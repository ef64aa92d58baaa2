"""Files that survive a kill, a full disk and a second writer: atomic writes and checksums."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from robuq_bench.errors import RobuqError

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_FOLDER_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
# The four-byte marks first: UTF-16's little-endian mark is the beginning of UTF-32's.
_FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def expand_user(path: Path | str) -> Path:
    """`path` with a leading `~` replaced; as it is where no such home folder is known.

    Unlike `Path.expanduser`, which raises a RuntimeError then (containers have users without one).
    """
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # a null byte, which no user's name holds: no such file either
        return Path(path)


def cache_folder() -> Path | None:
    """Return ROBUQ_CACHE, or ~/.cache/robuq-bench; None for a user without a home folder."""
    named = os.environ.get("ROBUQ_CACHE")
    if named:
        return Path(named)
    home = expand_user("~")
    return home / ".cache" / "robuq-bench" if home.is_absolute() else None


def read_text(path: Path | str) -> str:
    """Return a UTF-8 file's text without the byte-order mark that some editors put first.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8; says which encoding its byte-order mark names, if it has one.
    """
    data = Path(path).read_bytes()
    for mark, name in _FOREIGN_MARKS:
        if data.startswith(mark):
            raise ValueError(f"its byte-order mark says {name}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from None


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits, read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def output_error(path: Path, error: OSError | str) -> RobuqError:
    """Turn a failed write to `path` into a message that names the folder and the way out."""
    return _failure(f"cannot write {path.name!r} in folder {path.parent}", error)


def _failure(what: str, error: OSError | str) -> RobuqError:
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else error
    full = isinstance(error, OSError) and error.errno in _NO_SPACE
    advice = "free some space there" if full else "make that place writable"
    return RobuqError(
        f"{what}: {reason}; {advice} or choose another folder with --output. "
        "Files written earlier are intact."
    )


def temporary_path(path: Path) -> Path:
    """Return the hidden name beside `path` under which its next content is prepared."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path, *, recursive: bool = False) -> list[Path]:
    """Delete what killed writers left under `folder`; call it only as the folder's sole writer.

    Returns:
        The paths that were deleted.

    Raises:
        RobuqError: a leftover cannot be deleted.
    """
    pattern = ".*.tmp"
    stale = sorted(folder.rglob(pattern) if recursive else folder.glob(pattern))
    for path in stale:
        try:
            _remove(path)
        except OSError as error:
            raise output_error(path, error) from error
    return stale


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Create `folder` with its parents and return it.

    Raises:
        RobuqError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _failure(f"cannot create folder {folder}", error) from error
    return folder


def sync_file(path: Path) -> None:
    """Force a file's (or, on POSIX, a folder's) content to the disk.

    A file system that cannot flush folders (CIFS, VirtualBox shares, some FUSE) is no error: a
    rename is atomic there all the same.
    """
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return  # Windows offers no handle on a folder to flush
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`; a short write (a disk filling up) continues until the kernel refuses."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to fill; on success it is synced and takes the place of `path`.

    The body may create the temporary as a file, or as a folder that holds one file called
    `path.name` (for writers that make temporaries of their own). On failure it is removed and
    `path` keeps its old content.

    Raises:
        RobuqError: an `OSError` in the body or in the replacement, naming the folder.
    """
    make_folder(path.parent)
    temporary = temporary_path(path)
    try:
        _remove(temporary)  # left by a killed process that had the same number, as in containers
        yield temporary
        source = temporary / path.name if temporary.is_dir() else temporary
        sync_file(source)
        os.replace(source, path)
        if temporary.is_dir():
            temporary.rmdir()
        sync_file(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            _remove(temporary)
        if isinstance(error, OSError):
            raise output_error(path, error) from error
        raise


def atomic_write_bytes(path: Path, data: bytes) -> Path:
    """Write `data` to `path` so that at any instant the old or the new content is there, whole.

    Temporary file in the same folder, fsync, rename over the target, fsync of the folder.

    Raises:
        RobuqError: the folder cannot be written or is full; the old content is intact.
    """
    with replacing(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)
    return path


def atomic_write_text(path: Path, text: str) -> Path:
    """`atomic_write_bytes` of UTF-8 text."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def append_durably(path: Path, data: bytes) -> None:
    """Append `data` and fsync; a failed append is cut off again, so `path` stays as it was.

    Raises:
        RobuqError: the folder cannot be written or is full.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise output_error(path, error) from error


def truncate_durably(path: Path, size: int) -> None:
    """Cut a file to its first `size` bytes and fsync.

    Raises:
        RobuqError: the file cannot be written.
    """
    try:
        with open(path, "r+b") as stream:
            stream.truncate(size)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise output_error(path, error) from error


def read_checksums(path: Path) -> list[str]:
    """Return the digests of a `sha256sum`-style file (`<64 hex>  <name>` per line), in order.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file.
    """
    digests = [line.split(" ", 1)[0] for line in path.read_text("utf-8").splitlines()]
    if not digests or any(len(d) != 64 or set(d) - set("0123456789abcdef") for d in digests):
        raise ValueError(f"{path.name} is not a SHA-256 file")
    return digests
