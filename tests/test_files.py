"""Atomic writes and durable appends: after any failure the old content is there, whole."""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from robuq_bench.errors import RobuqError
from robuq_bench.files import (
    append_durably,
    atomic_write_bytes,
    atomic_write_text,
    cache_folder,
    expand_user,
    read_checksums,
    read_text,
    remove_temporaries,
    sha256_file,
)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Let no file grow past 10,000 bytes: writes come up short, then fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_digest_of_published_vectors(tmp_path: Path) -> None:
    # FIPS 180-4 examples: the empty message, and a million times "a"
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    million = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert sha256_file(atomic_write_bytes(tmp_path / "0", b"")) == empty
    assert sha256_file(atomic_write_bytes(tmp_path / "a", b"a" * 10**6)) == million


def test_write_replaces_whole_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    assert atomic_write_text(path, "first é\n") == path
    assert path.read_bytes() == "first é\n".encode()
    atomic_write_bytes(path, b"")
    assert path.read_bytes() == b""
    assert [entry.name for entry in path.parent.iterdir()] == ["c.txt"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = atomic_write_bytes(tmp_path / "a.bin", b"old")

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    advice = "free some space" if code == errno.ENOSPC else "make that place writable"
    with pytest.raises(RobuqError, match=f"'a.bin' in folder {tmp_path}: .*{advice}.*--output"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.usefixtures("small_disk")
def test_full_disk(tmp_path: Path) -> None:
    path = atomic_write_bytes(tmp_path / "a.bin", b"old")
    with pytest.raises(RobuqError, match="free some space"):
        atomic_write_bytes(path, bytes(10_001))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.usefixtures("small_disk")
def test_failed_append_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_durably(path, b"x" * 9_000)
    with pytest.raises(RobuqError, match=f"'log' in folder {tmp_path}"):
        append_durably(path, b"y" * 2_000)
    append_durably(path, b"z" * 1_000)
    assert path.read_bytes() == b"x" * 9_000 + b"z" * 1_000


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(tmp_path / "a", b"new")
    with pytest.raises(KeyboardInterrupt):
        append_durably(tmp_path / "log", b"line")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"log": b""}


@pytest.mark.parametrize("place", ["file/a", "file/folder/a"])
def test_place_that_is_no_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    for write in (atomic_write_bytes, append_durably):
        with pytest.raises(RobuqError, match=str(tmp_path / "file")):
            write(tmp_path / place, b"data")


def test_read_only_file_system() -> None:
    with pytest.raises(RobuqError, match="/proc"):
        atomic_write_bytes(Path("/proc/robuq/a"), b"data")


def test_temporaries_are_removed(tmp_path: Path) -> None:
    (tmp_path / "keep.tmp").write_text("")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / ".a.1.tmp").write_text("")
    (tmp_path / "deep" / ".b.2.tmp").mkdir(parents=True)
    (tmp_path / "deep" / ".b.2.tmp" / "b").write_text("")
    assert len(remove_temporaries(tmp_path)) == 1
    assert len(remove_temporaries(tmp_path, recursive=True)) == 1
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"keep.tmp", ".hidden", "deep"}


def test_checksum_files(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    assert read_checksums(atomic_write_text(tmp_path / "a", f"{digest}  name\n")) == [digest]
    for text in ("", "\n", f"{digest[:-1]}  name\n", f"{digest.upper()}  name\n"):
        with pytest.raises(ValueError, match="not a SHA-256 file"):
            read_checksums(atomic_write_text(tmp_path / "b", text))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("of_a_folder", [True, False])
def test_a_file_system_that_cannot_flush_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, of_a_folder: bool
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_a_folder:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "a.bin"
    if of_a_folder and code != errno.EIO:
        atomic_write_bytes(path, b"new")
        assert path.read_bytes() == b"new"
    else:  # an error of the disk, or a file that is not on it
        with pytest.raises(RobuqError, match=r"a\.bin"):
            atomic_write_bytes(path, b"new")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text_comes_without_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_text("für \ufeff\n", encoding)
    assert read_text(tmp_path / "a") == "für \ufeff\n"


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("ROBUQ_CACHE", raising=False)
    assert expand_user("~/a") == Path("/home/me/a")
    assert cache_folder() == Path("/home/me/.cache/robuq-bench")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert expand_user("~/a") == Path("~/a")
    for odd in ("~nobody-here/a", "~a\0b"):
        assert expand_user(odd) == Path(odd)
    assert cache_folder() is None
    monkeypatch.setenv("ROBUQ_CACHE", "/scratch")
    assert cache_folder() == Path("/scratch")
