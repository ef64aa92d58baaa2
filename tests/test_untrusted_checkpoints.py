"""Other people's checkpoints: no pickle runs code, no damage goes unnoticed."""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robuq_bench.checkpointing import (
    load_untrusted_checkpoint,
    read_safetensors,
    save_tensors,
    sidecar_path,
)
from robuq_bench.errors import CheckpointError
from robuq_bench.files import sha256_file
from robuq_bench.weight_files import checkpoint_digest


def tensors_of(step: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size,), float(step)), "step": torch.tensor(step)}


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0b100
    path.write_bytes(data)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside_namespace", [True, False])
def test_malicious_pickle_is_refused(tmp_path: Path, zipped: bool, inside_namespace: bool) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    payload: object = Malicious(proof)
    if inside_namespace:
        payload = argparse.Namespace(hidden=payload)
    torch.save({"ema": tensors_of(1), "args": payload}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.pt was refused"):
        load_untrusted_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the payload does work where it is trusted
    assert proof.exists()


def test_bare_malicious_pickle_is_refused(tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    path.write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(CheckpointError, match=r"evil\.pth was refused"):
        load_untrusted_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoint_of_dit_gives_its_moving_average(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "0400000.pt"
    torch.save(
        {
            "model": tensors_of(1),
            "ema": tensors_of(2),
            "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(model="DiT-XL/2", image_size=256),
        },
        path,
        _use_new_zipfile_serialization=zipped,
    )
    state = load_untrusted_checkpoint(path)
    assert torch.equal(state["weight"], tensors_of(2)["weight"])
    assert set(state) == {"weight", "step"}


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_other_places_of_the_state_dict(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "a.pt"
    torch.save({key: tensors_of(4), "epoch": 3} if key else tensors_of(4), path)
    assert torch.equal(load_untrusted_checkpoint(path)["weight"], tensors_of(4)["weight"])


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"ema": {"state_dict": state}, "model": {"a": torch.zeros(1)}},
        lambda state: {"state_dict": {"model": state, "epoch": 3}},
        lambda state: {"model_state_dict": state, "optimizer": {}},
        lambda state: {"checkpoint": 1, "model": {"module": {"ema": state}}},
        lambda state: {"model_ema": state, "state_dict": {"a": torch.zeros(1)}},
    ],
)
def test_nested_state_dicts_are_found_averages_first(
    tmp_path: Path, nest: Callable[[object], object]
) -> None:
    torch.save(nest(tensors_of(4)), tmp_path / "a.pt")
    state = load_untrusted_checkpoint(tmp_path / "a.pt")
    assert state.keys() == {"weight", "step"}
    assert torch.equal(state["weight"], tensors_of(4)["weight"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "nothing"),
        ([1, 2], "a list"),
        ({"epoch": 3}, r"no tensors: epoch \(int\)"),
        ({"ema": {"a": 1}}, r"no tensors: a \(int\)"),
        # Its moving average has no names; the weights beside it are not a substitute.
        ({"ema": {"shadow_params": [torch.zeros(2)]}, "model": tensors_of(1)}, "shadow_params"),
        ({"generator": tensors_of(1), "epoch": 3}, r"generator \(dict\), epoch \(int\)"),
        ({"weight": torch.zeros(2), "step": 3}, r"no tensors: step \(int\)"),
        ({"ema": {"ema": {"ema": {"ema": {"ema": tensors_of(1)}}}}}, r"ema \(dict\)"),
    ],
)
def test_file_without_a_state_dict(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt holds no state dict.*but .*{found}"):
        load_untrusted_checkpoint(tmp_path / "a.pt")


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def zipped(names: list[str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"a")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pt"))
    return file.getvalue()


def scripted() -> bytes:
    return zipped(["m/data.pkl", "m/code/m.py", "m/constants.pkl", "m/version"])


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 2700612341\n"
KINDS = [
    (b"", "it is empty", "download it again"),
    (LFS, "a Git LFS pointer, not the weights", "git lfs pull"),
    (b"\n <!DOCTYPE html><html><body>Sign in", "a web page", "download the file itself"),
    (b"<html>404</html>", "a web page", "download the file itself"),
    (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "XML text", "download"),
    (b'{"error": "Repository not found"}', "JSON text", "download"),
    (gzip.compress(saved(tensors_of(1))), "gzip-compressed", "unpack"),
    (bz2.compress(b"a"), "bzip2-compressed", "unpack"),
    (lzma.compress(b"a"), "xz-compressed", "unpack"),
    (tarred(), "a tar archive", "unpack"),
    (zipped(["dit/model.pt", "README"]), r"a zip archive with dit/model\.pt, README", "unpack"),
    (npz(), r"a NumPy archive \(\.npz\)", "safetensors"),
    (scripted(), "a TorchScript archive", "state_dict"),
    (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file", "convert"),
    (b"GGUF" + bytes(50), "a GGUF file", "safetensors"),
    (pickle.dumps({"a": [1.0]}), "a plain pickle", "torch.save"),
    (b"some notes\n", "damaged|no safetensors file", "again"),
    (bytes(3), "damaged|no safetensors file", "again"),
    (bytes(range(256)), "damaged|no safetensors file", "again"),
]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
@pytest.mark.parametrize(("content", "kind", "way_out"), KINDS)
def test_what_is_no_checkpoint_is_named_with_a_way_out(
    tmp_path: Path, name: str, content: bytes, kind: str, way_out: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=kind) as caught:
        load_untrusted_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert way_out in message
    # Neither the library's words nor its advice to switch the protection off.
    for unwanted in ("weights_only", "PyTorch 2.6", "header", "\n"):
        assert unwanted not in message


@pytest.mark.parametrize("content", [content for content, *_ in KINDS])
def test_the_packages_own_files_are_named_too(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"was refused: it is|is no safetensors file"):
        read_safetensors(path)


def test_misnamed_formats_are_read_or_told(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", tensors_of(2), {})
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pt")
    state = load_untrusted_checkpoint(tmp_path / "a.pt")
    assert torch.equal(state["weight"], tensors_of(2)["weight"])
    (tmp_path / "b.safetensors").write_bytes(saved(tensors_of(2)))
    with pytest.raises(CheckpointError, match=r"rename it to \.pt if torch\.save wrote it"):
        load_untrusted_checkpoint(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"a": np.float64(3)}, r"numpy\.\S*scalar"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_a_refused_pickle_says_what_it_asked_for(
    tmp_path: Path, content: object, name: str
) -> None:
    (tmp_path / "a.pt").write_bytes(saved(content))
    with pytest.raises(CheckpointError, match=rf"refused: .* it asks for {name},") as caught:
        load_untrusted_checkpoint(tmp_path / "a.pt")
    assert "save its state dict alone" in str(caught.value)
    # The library advises to switch the protection off.
    assert "weights_only" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@given(content=st.binary(max_size=200), data=st.data())
def test_any_bytes_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    start = data.draw(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"<", bytes(8) + b"{"]))
    path = tmp_path_factory.getbasetemp() / "any.pt"
    path.write_bytes(start + content)
    with pytest.raises(CheckpointError, match=r"any\.pt"):
        load_untrusted_checkpoint(path)


SHARDS = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.zeros(3)}}


def write_shards(folder: Path, **changes: object) -> Path:
    """A sharded checkpoint as save_pretrained writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, object] = {}
    for name, tensors in SHARDS.items():
        save_tensors(folder / name, tensors, {})
        weight_map |= dict.fromkeys(tensors, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changes}))
    return index


def test_folders_of_save_pretrained_stand_for_their_weights(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    digests = set()
    for path in (tmp_path / "pipeline", index.parent, index):
        state = load_untrusted_checkpoint(path, expected_sha256=checkpoint_digest(path))
        assert state.keys() == {"a", "b"}
        digests.add(checkpoint_digest(path))
    assert len(digests) == 1
    save_tensors(index.parent / "two.safetensors", {"b": torch.ones(3)}, {})
    assert checkpoint_digest(index) not in digests
    with pytest.raises(CheckpointError, match="not the expected file"):
        load_untrusted_checkpoint(index, expected_sha256=digests.pop())
    single = tmp_path / "single"
    single.mkdir()
    torch.save(tensors_of(3), single / "pytorch_model.bin")
    assert torch.equal(load_untrusted_checkpoint(single)["weight"], tensors_of(3)["weight"])
    assert checkpoint_digest(single) == sha256_file(single / "pytorch_model.bin")


def test_folders_that_do_not_say_which_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder without .* it holds no weights"):
        load_untrusted_checkpoint(tmp_path)
    for name in ("x.pt", "y.pt"):
        torch.save(tensors_of(1), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is a folder .*name one of its files: x\.pt, y\.pt"):
        load_untrusted_checkpoint(tmp_path)
    index = write_shards(tmp_path)
    save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="is a folder with both"):
        load_untrusted_checkpoint(tmp_path)
    assert load_untrusted_checkpoint(index).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no index of shards"),
        ("[]", "no index of shards"),
        ('{"weight_map": 3}', "no index of shards"),
        ('{"weight_map": {"a": ["b"]}}', "no index of shards"),
        ('{"weight_map": {}}', "0 shards"),
        ('{"weight_map": {"a": 3}}', "names 3, not a file beside it"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"missing: gone\.safetensors"),
    ],
)
def test_damaged_indices_are_refused(tmp_path: Path, text: str, message: str) -> None:
    index = write_shards(tmp_path)
    index.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_untrusted_checkpoint(index)


def test_shards_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    save_tensors(tmp_path / "two.safetensors", {"a": torch.ones(3), "b": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="two shards hold 'a'"):
        load_untrusted_checkpoint(index)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_untrusted_file(tmp_path: Path, fraction: float, name: str, zipped: bool) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(tensors_of(1), path, _use_new_zipfile_serialization=zipped)
    else:
        save_tensors(path, tensors_of(1), {})
        sidecar_path(path).unlink()
    assert torch.equal(load_untrusted_checkpoint(path)["weight"], tensors_of(1)["weight"])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=str(path)):
        load_untrusted_checkpoint(path)


def test_untrusted_digest_is_checked_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(tensors_of(1), path)
    digest = sha256_file(path)
    assert load_untrusted_checkpoint(path, expected_sha256=digest)
    flip_bit(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged or not the expected file"):
        load_untrusted_checkpoint(path, expected_sha256=digest)
    own = tmp_path / "own.safetensors"
    save_tensors(own, tensors_of(1), {})
    flip_bit(own, -1)
    with pytest.raises(CheckpointError, match=r"own\.safetensors is damaged"):
        load_untrusted_checkpoint(own)
