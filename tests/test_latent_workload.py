"""The ImageNet path on small files in the real formats: latents, VAE, ADM reference, sigma."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from robuq_bench._compat import import_torchvision
from robuq_bench.checkpointing import save_tensors
from robuq_bench.config import Config, config_hash, load_workload, resolve
from robuq_bench.context import Context, RunResult
from robuq_bench.errors import CheckpointError, MissingResourceError
from robuq_bench.judging.feature_networks import load_classifier
from robuq_bench.judging.fidelity import feature_statistics
from robuq_bench.models.dit import DiT
from robuq_bench.progress import Progress
from robuq_bench.runs.run import open_existing
from robuq_bench.runs.study import run_study
from studies.train_and_eval import study as train_and_eval

WORKLOAD = """
extends = "imagenet256"
[model]
input_size = 4
hidden_size = 48
depth = 1
num_heads = 2
num_classes = 3
[teacher]
checkpoint = "{folder}/teacher.pt"
[data]
path = "{folder}/latents"
image_size = 4
num_classes = 3
[training]
steps = 3
batch_size = 4
warmup_steps = 1
sensitivity_steps = 1
calibration_samples = 6
checkpoint_every_steps = 2
log_every_steps = 1
precision = "fp32"
compile = false
[evaluation]
sampler = "ddpm"
sampling_steps = 2
num_samples = 24
seed_ranges = 1
batch_size = 12
features = "digits"
adapt_images = true
reference = "{folder}/reference.npz"
vae = "{folder}/vae"
grid_images = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    (folder / "latents").mkdir()
    save_tensors(
        folder / "latents" / "shard-0.safetensors",
        {
            "latents": torch.randn(30, 4, 4, 4, generator=generator),
            "labels": torch.arange(30) % 3,
        },
        {},
    )
    fields = load_workload("imagenet256").model.model_copy(
        update={"input_size": 4, "hidden_size": 48, "depth": 1, "num_heads": 2, "num_classes": 3}
    )
    torch.manual_seed(0)
    model = DiT.from_config(fields)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.05)
    torch.save(model.state_dict(), folder / "teacher.pt")  # the released format

    images = torch.randint(0, 256, (80, 3, 32, 32), generator=generator, dtype=torch.uint8)
    features = load_classifier(adapts=True).extract(images)
    pool, spatial = feature_statistics(features.pool), feature_statistics(features.spatial)
    np.savez(
        folder / "reference.npz",
        mu=pool.mu,
        sigma=pool.sigma,
        mu_s=spatial.mu,
        sigma_s=spatial.sigma,
        arr_0=images.permute(0, 2, 3, 1).numpy(),
    )
    import_torchvision()
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    (folder / "tiny.toml").write_text(WORKLOAD.format(folder=folder))
    return folder


def make(folder: Path, *overrides: str) -> Config:
    path = str(folder / "tiny.toml")
    return resolve("train-and-eval", train_and_eval.VERSION, "a2", path, 0, list(overrides))


def run_job(config: Config, root: Path) -> RunResult:
    context = Context.create(device="cpu", threads=1, progress=Progress(quiet=True), argv=["test"])
    return run_study(config, root, context)


@pytest.mark.filterwarnings("ignore:covariances are rank-deficient")
def test_latents_are_decoded_and_judged_by_the_adm_reference(folder: Path, tmp_path: Path) -> None:
    result = run_job(make(folder), tmp_path)
    run = open_existing(result.path)
    rows = [record for record in run.results() if record["kind"] == "metrics"]
    assert {record["subject"] for record in rows} == {"teacher", "student"}
    names = ("fid_digits_adapted", "precision_digits_adapted")
    assert not any("fid_digits" in record for record in rows)
    assert all(np.isfinite(record[name]) for record in rows for name in names)
    images = np.load(result.path / "samples" / "student-0.npz")["arr_0"]
    assert images.shape == (24, 32, 32, 3)
    assert images.dtype == np.uint8
    losses = [record for record in run.results() if record["kind"] == "train"]
    assert all(np.isfinite(record["denoising_loss"]) for record in losses)


@pytest.mark.parametrize(
    ("override", "message"),
    [("evaluation.reference=none", "evaluation.reference"), ("evaluation.vae=/nowhere", "VAE")],
)
def test_what_is_missing_shows_before_any_training(
    folder: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(MissingResourceError, match=message):
        run_job(make(folder, override), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name", ["reference.npz", "vae/config.json", "latents/shard-0.safetensors"]
)
def test_what_changed_since_the_run_was_planned_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tiny.toml").write_text(WORKLOAD.format(folder=copy))
    config = make(copy)
    assert config_hash(config) == config_hash(make(folder))
    if name.endswith("json"):
        (copy / name).write_text((copy / name).read_text() + " ")
    elif name.endswith("npz"):
        arrays = dict(np.load(copy / name))
        np.savez(copy / name, **{**arrays, "mu": arrays["mu"] + 1})
    else:
        tensors = {"latents": torch.randn(30, 4, 4, 4), "labels": torch.arange(30) % 3}
        save_tensors(copy / name, tensors, {})
    with pytest.raises(CheckpointError, match=rf"{name.split('/')[0]}.*changed"):
        run_job(config, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert config_hash(make(copy)) != config_hash(config)
