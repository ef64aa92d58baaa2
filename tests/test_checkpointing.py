"""Checkpoints: no kill, truncation or flipped bit goes unnoticed."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from robuq_bench.checkpointing import (
    CheckpointStore,
    load_tensors,
    load_untrusted_checkpoint,
    read_safetensors,
    save_tensors,
    sidecar_path,
)
from robuq_bench.errors import CheckpointError, RobuqError
from robuq_bench.files import sha256_file, temporary_path

ROOT = Path(__file__).resolve().parents[1]


def tensors_of(step: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size,), float(step)), "step": torch.tensor(step)}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (500, 1000):
        store.save(step, tensors_of(step), {"step": str(step)})
    return store


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0b100
    path.write_bytes(data)


def test_round_trip_keeps_values_dtypes_shapes_and_metadata(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {
        "transposed": base.reshape(3, 4).T,
        "view": base[2:5],
        "whole": base,
        "same": base,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
    }
    metadata = {"config": '{"é": "\\n"}', "b": "2", "a": "1"}
    path = tmp_path / "new" / "model.safetensors"
    digest = save_tensors(path, tensors, metadata)
    loaded, read = load_tensors(path)
    assert read == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert digest == sha256_file(path)
    assert not list(path.parent.glob(".*"))
    checked = subprocess.run(
        ["sha256sum", "-c", sidecar_path(path).name], cwd=path.parent, capture_output=True
    )
    assert checked.returncode == 0


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    path, metadata = tmp_path / "a.safetensors", {key: key for key in "qwertyuiop"}
    plain, own = set(), set()
    for _ in range(6):
        save_file(tensors_of(1), path, metadata=metadata)
        plain.add(sha256_file(path))
        own.add(save_tensors(path, dict(reversed(tensors_of(1).items())), metadata))
        own.add(save_tensors(path, tensors_of(1), dict(reversed(metadata.items()))))
    assert len(own) == 1
    assert len(plain) > 1  # safetensors alone orders metadata keys at random


def test_changing_loaded_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, tensors_of(1), {})
    load_tensors(path)[0]["weight"].add_(1)
    assert torch.equal(load_tensors(path)[0]["weight"], tensors_of(1)["weight"])


def test_foreign_safetensors_keep_their_own_metadata(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(tensors_of(3), path, metadata={"format": "pt"})
    tensors, metadata = load_tensors(path, expected_sha256=sha256_file(path))
    assert metadata == {"format": "pt"}
    assert torch.equal(tensors["weight"], tensors_of(3)["weight"])
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors.*sha256 is missing"):
        load_tensors(path)


def test_metadata_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="str to str"):
        save_tensors(tmp_path / "a.safetensors", tensors_of(1), {"step": 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.999])
def test_truncation_is_found_and_the_previous_one_used(
    store: CheckpointStore, fraction: float, caplog: pytest.LogCaptureFixture
) -> None:
    newest = store.path(1000)
    data = newest.read_bytes()
    newest.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=r"step-00001000\.safetensors is damaged"):
        load_tensors(newest)
    with caplog.at_level(logging.WARNING):
        loaded = store.load_latest()
    assert loaded is not None
    assert loaded[0] == 500
    assert torch.equal(loaded[1]["weight"], tensors_of(500)["weight"])
    assert loaded[2] == {"step": "500"}
    assert "step-00001000.safetensors" in caplog.text


@pytest.mark.parametrize("position", [0, 9, 60, 2000, -1])
def test_every_flipped_bit_is_found(store: CheckpointStore, position: int) -> None:
    flip_bit(store.path(1000), position)
    with pytest.raises(CheckpointError, match=r"step-00001000\.safetensors"):
        load_tensors(store.path(1000))
    assert store.load_latest()[0] == 500  # type: ignore[index]


def test_flipped_bit_would_pass_without_the_digest(store: CheckpointStore) -> None:
    path = store.path(1000)
    flip_bit(path, -1)
    with safe_open(path, framework="pt") as stream:
        values = [stream.get_tensor(name) for name in ("weight", "step")]
    expected = tensors_of(1000)
    assert not all(map(torch.equal, values, (expected["weight"], expected["step"])))


@pytest.mark.parametrize("content", [None, "", "not a digest\n", "\xff"])
def test_missing_or_damaged_sidecar(store: CheckpointStore, content: str | None) -> None:
    sidecar = sidecar_path(store.path(1000))
    sidecar.unlink()
    if content is not None:
        sidecar.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"step-00001000\.safetensors cannot be verified"):
        load_tensors(store.path(1000))
    assert store.load_latest()[0] == 500  # type: ignore[index]
    store.save(1000, tensors_of(1000), {})
    assert store.load_latest()[0] == 1000  # type: ignore[index]


def test_expected_digest_overrules_the_sidecar(store: CheckpointStore) -> None:
    path = store.path(500)
    assert load_tensors(path, expected_sha256=sha256_file(path).upper())[1] == {"step": "500"}
    with pytest.raises(CheckpointError, match=f"expected {'0' * 64}"):
        load_tensors(path, expected_sha256="0" * 64)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        load_tensors(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        load_untrusted_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a folder; name the file"):
        load_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="is a folder; name the file"):
        read_safetensors(tmp_path)
    for load in (load_tensors, read_safetensors, load_untrusted_checkpoint):
        with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
            load(tmp_path / ("a" * 300))


def test_store_is_empty_then_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.load_latest() is None
    for step in (1, 2, 3):
        store.save(step, tensors_of(step), {})
    assert store.steps() == [2, 3]
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "step-00000002.safetensors",
        "step-00000002.safetensors.sha256",
        "step-00000003.safetensors",
        "step-00000003.safetensors.sha256",
    ]


def test_save_after_going_back_is_what_the_next_load_finds(store: CheckpointStore) -> None:
    flip_bit(store.path(1000), -1)
    store.keep = 1
    store.save(700, tensors_of(700), {})
    assert store.steps() == [700]
    assert store.load_latest()[0] == 700  # type: ignore[index]


def test_all_damaged_is_an_error(store: CheckpointStore) -> None:
    flip_bit(store.path(500), -1)
    flip_bit(store.path(1000), -1)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*step-00000500"):
        store.load_latest()


def test_stale_temporaries_are_cleaned_by_the_next_save(store: CheckpointStore) -> None:
    folder = store.folder / ".step-00001500.safetensors.1.tmp"
    folder.mkdir()
    (folder / "step-00001500.safetensors").write_bytes(b"half")
    (store.folder / ".step-00001000.safetensors.sha256.1.tmp").write_text("x")
    assert store.load_latest()[0] == 1000  # type: ignore[index]
    store.save(1500, tensors_of(1500), {})
    assert not list(store.folder.glob(".*"))


def test_leftover_of_a_killed_process_with_our_number(store: CheckpointStore) -> None:
    # in a container every process may have the same number
    leftover = temporary_path(store.path(1000))
    leftover.mkdir()
    (leftover / "half").write_bytes(b"half")
    temporary_path(sidecar_path(store.path(1000))).write_bytes(b"half")
    save_tensors(store.path(1000), tensors_of(3), {})
    assert torch.equal(load_tensors(store.path(1000))[0]["weight"], tensors_of(3)["weight"])
    assert not list(store.folder.glob(".*"))


@pytest.mark.parametrize("target", ["step-00001000.safetensors", "step-00001500.safetensors"])
def test_full_disk_keeps_what_was_there(store: CheckpointStore, target: str) -> None:
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RobuqError, match=f"{target}.*{store.folder}.*free some space"):
            save_tensors(store.folder / target, tensors_of(9, size=100_000), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before


@pytest.mark.parametrize("failing_call", range(12))
def test_any_failing_sync_leaves_old_or_new(
    store: CheckpointStore, failing_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call + 1:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        save_tensors(store.path(1000), tensors_of(2000), {"step": "2000"})
    except RobuqError as error:
        assert "No space left on device" in str(error)  # noqa: PT017
    else:
        assert failing_call >= calls
    tensors, metadata = load_tensors(store.path(1000))
    assert metadata["step"] in ("1000", "2000")
    assert torch.equal(tensors["weight"], tensors_of(int(metadata["step"]))["weight"])


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    with pytest.raises(RobuqError, match=f"{tmp_path}/file"):
        store.save(1, tensors_of(1), {})


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from robuq_bench.checkpointing import CheckpointStore, load_tensors, save_tensors
from robuq_bench.files import remove_temporaries

torch.set_num_threads(1)
folder = Path(sys.argv[1])
store, single, plain = CheckpointStore(folder / "store"), folder / "a.safetensors", folder / "a.pt"
random_source = random.Random(0)

def save(mode, tensors, step):
    if mode == "plain":
        torch.save(tensors, plain)
    elif mode == "store":
        store.save(step, tensors, {"step": str(step)})
    else:
        save_tensors(single, tensors, {"step": str(step)})

def check(mode, acknowledged):
    if mode == "plain":
        torch.load(plain, weights_only=True)
        return
    tensors, metadata = store.load_latest()[1:] if mode == "store" else load_tensors(single)
    assert bool((tensors["x"] == float(metadata["step"])).all()), "wrong values"
    assert int(metadata["step"]) >= acknowledged, "lost a finished save"

def kill_one(mode, start):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(start, start + 100_000):
            save(mode, {"x": torch.full((1_000_000,), float(step))}, step)
            os.write(writer, b"%d\\n" % step)
    os.close(writer)
    answers = os.read(reader, 4096)  # one save is finished; then die at a random instant
    time.sleep(random_source.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while piece := os.read(reader, 4096):
        answers += piece
    os.close(reader)
    return int(answers.split()[-1])

bad, during_save = {"store": [], "single": [], "plain": []}, 0
for mode, kills in (("store", 20), ("single", 20), ("plain", 8)):
    step = 1
    for _ in range(kills):
        step = kill_one(mode, step)
        during_save += bool(list(folder.rglob(".*.tmp")))
        try:
            check(mode, step)
        except Exception as error:
            bad[mode].append(f"{type(error).__name__}: {error}")
        step += 1
        remove_temporaries(folder, recursive=True)
print(json.dumps({**bad, "during_save": during_save}))
"""


@pytest.mark.timeout(300)  # 6 s of CPU, a minute when the machine is busy
def test_forty_kills_during_save_leave_nothing_unreadable(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["store"] == outcome["single"] == []
    assert outcome["during_save"] >= 5, outcome  # the kills did hit saves
    assert outcome["plain"], outcome  # and do damage a plain torch.save
