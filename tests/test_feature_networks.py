"""Where features come from: our classifier, torch-fidelity's Inception, torchvision's import."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor

from robuq_bench import _compat
from robuq_bench.config import load_workload
from robuq_bench.config.workload import EvaluationConfig
from robuq_bench.errors import CheckpointError, MissingResourceError
from robuq_bench.files import sha256_file
from robuq_bench.judging import feature_networks
from robuq_bench.judging.feature_networks import (
    load_classifier,
    load_feature_network,
    load_inception,
)
from robuq_bench.judging.features import ASSET


def evaluation_section(**fields: object) -> EvaluationConfig:
    return load_workload("digits").evaluation.model_copy(update=fields)


def test_a_file_of_ones_own_gives_its_name_to_the_metrics(tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(ASSET.read_bytes())
    digest = sha256_file(ASSET)
    path.with_name("copy.safetensors.sha256").write_text(f"{digest}  copy.safetensors\n")
    loaded = load_feature_network(evaluation_section(features=str(path)))
    assert (loaded.name, loaded.suffix, loaded.sha256) == ("digits", "_digits", digest)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_missing_or_foreign_inception_weights_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = str(tmp_path / "absent.pth")
    section = evaluation_section(features="inception", inception_weights=str(absent))
    with pytest.raises(MissingResourceError, match=r"absent\.pth.*evaluation\.inception_weights"):
        load_feature_network(section)

    def offline(*args: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(MissingResourceError, match="cannot be downloaded") as caught:
        load_inception()
    assert caught.value.exit_code == 4
    foreign = tmp_path / "foreign.pth"
    foreign.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=f"expected {feature_networks.INCEPTION_SHA256}"):
        load_inception(foreign)


def test_malicious_inception_file_is_not_executed(tmp_path: Path) -> None:
    trace, path = tmp_path / "executed", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(_Payload(trace)))
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_inception(path, expected_sha256=None)
    torch.save({"weight": _Payload(trace)}, path)
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_inception(path, expected_sha256=None)
    assert not trace.exists()


@pytest.mark.slow
def test_inception_features_are_torch_fidelitys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compat.import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    extractor = module.FeatureExtractorInceptionV3
    path = tmp_path / "random.pth"
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        original = extractor("original", ["2048", "logits_unbiased"])
    torch.save(original.state_dict(), path)
    network = load_inception(path, expected_sha256=None)
    images = torch.randint(0, 256, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    features = network.extract(images, 1)
    blocks: list[Tensor] = []
    original.Mixed_6d.register_forward_hook(lambda *call: blocks.append(call[2]))
    pool, logits = original(images.repeat(1, 3, 1, 1))
    spatial = blocks[0][:, :7].permute(0, 2, 3, 1).reshape(2, 2023)
    assert network.suffix == ""
    for got, expected in zip(vars(features).values(), (pool, spatial, logits), strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert spatial.std() > 0


def test_working_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    marker = SimpleNamespace()
    kept = len(_compat._keep_alive)
    monkeypatch.setattr(_compat, "_import", lambda: marker)
    assert _compat.import_torchvision.__wrapped__() is marker
    assert len(_compat._keep_alive) == kept


def test_other_import_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("libfoo is missing")

    monkeypatch.setattr(_compat, "_import", broken)
    with pytest.raises(RuntimeError, match="libfoo"):
        _compat.import_torchvision.__wrapped__()


def test_torchvision_works_under_the_workaround() -> None:
    torchvision = _compat.import_torchvision()
    assert torchvision is _compat.import_torchvision()
    assert hasattr(torchvision.datasets, "ImageFolder")
    tensor = torchvision.transforms.functional.center_crop(torch.zeros(3, 9, 9), [5, 5])
    assert tensor.shape == (3, 5, 5)
    assert load_classifier().name == "digits"
