"""Outliers that leave a teacher's function: exactness, channels, refusals, identity."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robuq_bench.config import (
    Config,
    config_from_toml,
    config_hash,
    load_workload,
    resolve,
    to_toml,
)
from robuq_bench.config.workload import OUTLIER_LAYERS, OutliersConfig
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.judging.shipped_samples import samples_asset, shipped_samples
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.models.outliers import add_outliers_, outlier_channels
from robuq_bench.quantization.watching import find_layers, watching

POWERS = st.integers(-3, 6).map(lambda exponent: 2.0**exponent)


def dit(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: int) -> DiT:
    """A small DiT with open gates and weights that are all different."""
    size = {"input_size": 8, "in_channels": 1, "hidden_size": 24, "depth": 2, "num_heads": 4}
    model = DiT(**{**size, **changes}, num_classes=10, learn_sigma=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def batch(model: DiT) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, model.in_channels, model.input_size, model.input_size, generator=generator)
    return x.to(model.pos_embed.dtype), torch.tensor([0, 400, 999]), torch.tensor([1, 10, 3])


@torch.no_grad()
def inputs_of(model: DiT, layers: list[str]) -> dict[str, torch.Tensor]:
    """What every layer sees, [images, tokens, in]."""
    seen: dict[str, torch.Tensor] = {}
    with watching(find_layers(model, layers), lambda name, x: seen.update({name: x.clone()})):
        model(*batch(model))
    return seen


@given(
    scale=st.floats(0.1, 100),
    channels=st.integers(1, 24),
    seed=st.integers(0, 5),
    layers=st.sets(st.sampled_from(OUTLIER_LAYERS), min_size=1),
)
def test_the_function_stays(scale: float, channels: int, seed: int, layers: set[str]) -> None:
    """In float64 to its rounding, so that float32's cannot hide a wrong row."""
    model = dit(seed, torch.float64)
    other = copy.deepcopy(model)
    found = add_outliers_(
        other, OutliersConfig(scale=scale, channels=channels, seed=seed, layers=tuple(layers))
    )
    assert {name.rpartition(".")[2] for name in found} == layers
    with torch.no_grad():
        expected, actual = model(*batch(model)), other(*batch(model))
    assert (actual - expected).norm() <= 1e-11 * expected.norm()


@given(scale=POWERS, channels=st.integers(1, 8))
def test_a_power_of_two_changes_no_bit_of_what_has_no_sum(scale: float, channels: int) -> None:
    """Of proj always; of qkv and fc1 where 1 + scale' needs no rounding."""
    model = dit()
    for block in model.blocks:
        modulation = block.adaLN_modulation[1]
        modulation.weight.data.zero_()
        modulation.bias.data = (64 * modulation.bias).round() / 64
    other = copy.deepcopy(model)
    add_outliers_(other, OutliersConfig(scale=scale, channels=channels))
    with torch.no_grad():
        assert torch.equal(model(*batch(model)), other(*batch(model)))
    model = dit()
    other = copy.deepcopy(model)
    add_outliers_(other, OutliersConfig(scale=scale, channels=channels, layers=("proj",)))
    with torch.no_grad():
        assert torch.equal(model(*batch(model)), other(*batch(model)))


def test_a_scale_of_one_changes_no_weight() -> None:
    model = dit()
    other = copy.deepcopy(model)
    add_outliers_(other, OutliersConfig(scale=1.0))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_channels_that_are_named_are_scaled_and_no_others() -> None:
    model = dit(dtype=torch.float64)
    other = copy.deepcopy(model)
    found = add_outliers_(other, OutliersConfig(scale=16.0, channels=3))
    layers = [*found, "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    before, after = inputs_of(model, layers), inputs_of(other, layers)
    for name in layers:
        ratio = torch.ones(before[name].shape[-1], dtype=torch.float64)
        ratio[found.get(name, [])] = 16.0
        torch.testing.assert_close(after[name], before[name] * ratio, rtol=1e-9, atol=1e-12)


def test_channels_depend_on_layer_and_seed_alone() -> None:
    first = add_outliers_(dit(), OutliersConfig(scale=4.0))
    again = add_outliers_(dit(1), OutliersConfig(scale=8.0, layers=("fc1",)))
    other = add_outliers_(dit(), OutliersConfig(scale=4.0, seed=1))
    assert all(torch.equal(first[name], channels) for name, channels in again.items())
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert len({tuple(channels.tolist()) for channels in first.values()}) > 1


@given(channels=st.integers(1, 24), seed=st.integers(0, 20))
def test_values_are_dealt_to_the_heads_evenly(channels: int, seed: int) -> None:
    found = outlier_channels("x", 24, OutliersConfig(scale=2.0, channels=channels, seed=seed), 4)
    counts = torch.bincount(found // 6, minlength=4)
    assert len(found.unique()) == channels
    assert counts.max() - counts.min() <= 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear is not the DiT"):
        add_outliers_(nn.Linear(2, 2), OutliersConfig(scale=2.0))
    with pytest.raises(UsageError, match=r"channels is 25, but blocks.0.attn.qkv has 24"):
        add_outliers_(dit(), OutliersConfig(scale=2.0, channels=25))
    with pytest.raises(UsageError, match="scale = 1e-06 changes the teacher's output"):
        add_outliers_(dit(), OutliersConfig(scale=1e-6))
    for text, said in (
        ("scale=0.0", "teacher.outliers.scale"),
        ('layers=["fc2"]', "GELU stands between"),
        ('layers=["adaLN"]', "unknown 'adaLN'"),
        ('layers=["qkv","qkv"]', "repeat a value"),
    ):
        with pytest.raises(ConfigError, match=said):
            configure(f"teacher.outliers.{text}")


def configure(*overrides: str, on: str = "digits-outliers") -> Config:
    return resolve("toy", "1", "a4", on, 0, list(overrides))


def test_outliers_are_part_of_a_run() -> None:
    plain, own = configure(on="digits"), configure()
    assert own.workload.teacher.outliers == OutliersConfig(scale=16.0, channels=2)
    assert own.workload.teacher.sha256 == plain.workload.teacher.sha256 != ""
    renamed = own.workload.model_copy(update={"name": "digits"})
    hashes = {config_hash(c) for c in (plain, resolve("toy", "1", "a4", renamed))}
    hashes |= {config_hash(configure(f"teacher.outliers.{text}", on="digits")) for text in
               ("scale=8.0", "scale=16.0")}  # fmt: skip
    assert len(hashes) == 3  # set on `digits`, they are the run of `renamed`
    ordered = [configure(f"teacher.outliers.layers={text}") for text in
               ('["proj","qkv"]', '["qkv","proj"]')]  # fmt: skip
    assert config_hash(ordered[0]) == config_hash(ordered[1])
    assert config_from_toml(to_toml(own), "x") == own
    assert '\noutliers = "none"\n' in to_toml(plain)
    assert config_from_toml(to_toml(plain), "x") == plain
    trains = resolve("train-teacher", "1", "fp", "digits-outliers")
    assert trains.workload.teacher.outliers is None


@pytest.mark.parametrize("name", ["digits-outliers"])
def test_packaged_outliers_leave_the_teacher(name: str) -> None:
    workload = load_workload(name)
    own, digest = load_teacher(workload, "cpu")
    teacher = workload.teacher.model_copy(update={"outliers": None})
    plain, same = load_teacher(workload.model_copy(update={"teacher": teacher}), "cpu")
    assert digest == same
    with torch.no_grad():
        expected, actual = plain(*batch(plain)), own(*batch(own))
    assert (actual - expected).norm() <= 2e-6 * expected.norm()
    assert samples_asset(workload) is None
    assert shipped_samples(workload, digest) is None
    layers = [f"blocks.{index}.attn.qkv" for index in range(workload.model.depth)]
    before, after = (inputs_of(model, layers) for model in (plain, own))
    peaks = [
        torch.cat([x.abs().amax(-1) / x.square().mean(-1).sqrt() for x in inputs.values()]).mean()
        for inputs in (before, after)
    ]
    assert peaks[1] > 1.5 * peaks[0] > 0


def test_a_teacher_of_diffusers_has_them_too(tmp_path: Path) -> None:
    from robuq_bench.checkpointing import save_tensors
    from robuq_bench.models.checkpoints import to_diffusers

    digits = load_workload("digits")
    plain, _ = load_teacher(digits, "cpu")
    path = tmp_path / "diffusers.safetensors"
    state = {name: value.clone() for name, value in to_diffusers(plain.state_dict()).items()}
    save_tensors(path, state, {})
    given_ = {"checkpoint": str(path), "sha256": "", "outliers": OutliersConfig(scale=4.0)}
    teacher = digits.teacher.model_copy(update=given_)
    own, _ = load_teacher(digits.model_copy(update={"teacher": teacher}), "cpu")
    with torch.no_grad():
        expected, actual = plain(*batch(plain)), own(*batch(own))
    assert 0 < (actual - expected).norm() <= 2e-6 * expected.norm()
