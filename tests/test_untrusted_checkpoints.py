"""Other people's checkpoints: no pickle runs code, no damage goes unnoticed."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch

from robuq_bench.checkpointing import (
    load_untrusted_checkpoint,
    save_tensors,
    sidecar_path,
)
from robuq_bench.errors import CheckpointError
from robuq_bench.files import sha256_file


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


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, {"ema": {"a": 1}}])
def test_file_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds no state dict"):
        load_untrusted_checkpoint(tmp_path / "a.pt")


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
