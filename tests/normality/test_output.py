"""Output errors and constant energy: brute force, closed forms, SciPy's bootstrap, the null."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from robuq_bench.config import load_plan
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.normality.analysis import REFERENCE_SETTINGS, analyse, draw_errors
from robuq_bench.normality.capture import CapturedTokens, load_weights, save_shard
from robuq_bench.normality.consequence import BITS, gaussian_error
from robuq_bench.normality.intervals import cluster_ratios, interval_of
from robuq_bench.normality.judgements import judgement_rows, output_verdicts
from robuq_bench.normality.output import (
    Energy,
    OutputSite,
    input_weight,
    norm_root,
    normal_errors,
)
from robuq_bench.normality.output_rows import constant_rows, layer_energies, output_rows
from robuq_bench.normality.summaries import Cell, Settings
from robuq_bench.normality.transforms import drawn_transforms, make_transform
from robuq_bench.quantization.convert import quantize_, quantized_layers

SETTINGS = Settings(alpha=0.05, draws=300, seed=0)
LAYER = "blocks.0.mlp.fc1"
TIMESTEPS = (250, 750)
IMAGES = torch.arange(20).repeat_interleave(4)


def tokens_of(seed: int, n: int, constant: float = 0.0) -> Tensor:
    """[80, n] uneven channels, a constant vector, and an image effect."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 2, n)
    base = constant * torch.randn(n, generator=torch.Generator().manual_seed(99))
    of_image = 0.3 * torch.randn(20, n, generator=draw).repeat_interleave(4, 0)
    return base + scale * (torch.randn(80, n, generator=draw) + of_image)


def tables(
    parts: dict[int, Tensor], weight: Tensor, name: str, calibration: Tensor | None = None
) -> dict[str, list[dict[str, object]]]:
    """All tables of one layer, as the study makes them."""
    site = OutputSite.of(weight, calibration)
    transform = make_transform(name, weight.shape[1], layer=LAYER)
    cells, energies = [], {}
    for timestep, tokens in parts.items():
        table = analyse(tokens, IMAGES, transform, 0, REFERENCE_SETTINGS, site)
        outputs = table.outputs
        if name == "randomized-hadamard":
            drawn = drawn_transforms(name, weight.shape[1], layer=LAYER, draws=4)
            outputs = draw_errors(tokens, drawn, site).outputs
        elif outputs is not None:
            outputs = outputs[:, None]
        cells.append(
            Cell(
                *("teacher", LAYER, timestep, name, weight.shape[1], table, None),
                *(outputs, table.centred),
            )
        )
        energies["teacher", LAYER, timestep] = Energy.of(CapturedTokens(tokens, IMAGES), site)
    layers = layer_energies(energies)
    norm = float(weight.double().square().sum())
    rows = output_rows(cells, layers, {("teacher", LAYER): norm}, SETTINGS)
    return rows | {"constant": constant_rows(layers, SETTINGS)}


@pytest.mark.parametrize("name", ["identity", "hadamard", "random-orthogonal", "block-hadamard-64"])
@pytest.mark.parametrize("out", [24, 200])
def test_output_errors_are_those_of_a_loop_in_float64(name: str, out: int) -> None:
    n = 64
    parts = {t: tokens_of(t, n, 1.5) for t in TIMESTEPS}
    weight = torch.randn(out, n, generator=torch.Generator().manual_seed(1))
    calibration = tokens_of(5, n, 1.5)
    found = tables(parts, weight, name, calibration)
    rotate = make_transform(name, n, layer=LAYER)
    basis = rotate(torch.eye(n, dtype=torch.float64)).numpy()
    x = torch.cat(list(parts.values())).double().numpy()
    w, m = weight.double().numpy(), x.mean(0)
    centre = calibration.double().numpy().mean(0)
    grid = token_grid("robust-midrise")

    def error(token: NDArray[np.float64], bits: int) -> float:
        y = torch.from_numpy(token @ basis)
        back = (grid.fake_quantize(y, bits).numpy() - y.numpy()) @ basis.T
        return sum(float(row @ back) ** 2 for row in w)

    signal = sum(sum(float(row @ (token - m)) ** 2 for row in w) for token in x)
    scale = sum(float(((token - m) ** 2).sum()) for token in x) / n
    assert [row["bits"] for row in found["output"]] == list(BITS)
    for row, v in zip(found["output"], normal_errors(n, torch.float32, 0), strict=True):
        bits = int(str(row["bits"]))
        plain = sum(error(token, bits) for token in x)
        centred = sum(error(token - centre, bits) for token in x)
        # Float32 tokens may round to the other side of a step.
        assert row["error"] == pytest.approx(plain / signal, rel=2e-3)
        assert row["centring_gain"] == pytest.approx(plain / centred, rel=4e-3)
        assert row["ratio"] == pytest.approx(plain / (v * scale * (w**2).sum()), rel=2e-3)
        assert row["normal_error"] == pytest.approx(v * scale * (w**2).sum() / signal, rel=1e-5)
    half = found["output_timesteps"][: len(BITS)]
    first = parts[250].double().numpy()
    own = sum(sum(float(row @ (token - m)) ** 2 for row in w) for token in first)
    assert half[1]["error"] == pytest.approx(sum(error(t, 2) for t in first) / own, rel=2e-3)
    for whole, layer in zip(found["output"], found["output_layers"], strict=True):
        assert whole.items() <= layer.items()  # one layer is its type


def test_the_share_of_constant_energy_in_closed_form() -> None:
    """Tokens m + (1, -1 in turns) along one direction: share ||m||^2 / (||m||^2 + 1) exactly."""
    n = 16
    m = torch.arange(n).float() / 4
    direction = torch.zeros(n)
    direction[3] = 1.0
    signs = torch.tensor([1.0, -1.0]).repeat(40)[:, None]
    found = tables({100: m + signs * direction}, torch.eye(n), "identity")["constant"]
    expected = float(m @ m) / (float(m @ m) + 1)
    assert [row["layer"] for row in found] == [LAYER, None]  # the layer, then its type
    for row in found:
        assert row["share"] == pytest.approx(expected, rel=1e-12)
        # Every image has both signs, so no resample differs.
        assert row["share_low"] == pytest.approx(expected, rel=1e-12)
        assert row["share_high"] == pytest.approx(expected, rel=1e-12)
    assert tables({100: tokens_of(0, n)}, torch.eye(n), "identity")["constant"][0]["share"] < 0.02


@pytest.mark.parametrize("name", ["identity", "randomized-hadamard", "random-orthogonal"])
def test_normal_tokens_have_ratio_one(name: str) -> None:
    """The null: white tokens through an uneven weight are within three standard errors of 1.

    Not at 8 bits, where the few entries that overload decide and 160 tokens have none.
    """
    n = 128
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(96, n, generator=draw) * torch.linspace(0.1, 3, n)
    parts = {t: 2.5 * torch.randn(80, n, generator=draw) for t in TIMESTEPS}
    found = tables(parts, weight, name)
    for row in found["output"][:4]:
        error = (float(str(row["high"])) - float(str(row["low"]))) / (2 * 1.96)
        assert 0 < error < 0.05
        assert abs(float(str(row["ratio"])) - 1) < 3 * error
        assert row["images"] == 20
    key = {"subject": "teacher", "layer_type": "fc1", "width": n, "transform": name, "images": 20}
    verdicts = output_verdicts([key], found["output"])
    # 160 tokens leave intervals wide enough to span the limit, and never beyond it.
    words = [verdict.verdict for verdict in verdicts][:4]
    assert "holds" in words
    assert "does not hold" not in words


def test_a_constant_vector_is_seen_by_the_second_rule_only() -> None:
    """Half the energy constant: random signs leave tokens normal, with twice the output error."""
    n = 128
    constant = torch.randn(n, generator=torch.Generator().manual_seed(8))
    draw = torch.Generator().manual_seed(4)
    parts = {t: constant + torch.randn(80, n, generator=draw) for t in TIMESTEPS}
    weight = torch.randn(64, n, generator=draw)
    found = tables(parts, weight, "randomized-hadamard", parts[250])
    two = found["output"][1]
    share = found["constant"][1]["share"]
    assert share == pytest.approx(
        float(constant @ constant) / (float(constant @ constant) + n), abs=0.02
    )
    assert two["ratio"] == pytest.approx(1 / (1 - float(str(share))), rel=0.1)
    assert two["centring_gain"] == pytest.approx(float(str(two["ratio"])), rel=0.15)
    assert two["centred_ratio"] == pytest.approx(1, abs=0.05)
    error = {
        **{k: two[k] for k in ("subject", "layer_type", "width", "transform", "bits")},
        "quantizer": "robust-midrise",
        "ratio": 1.0,
        "low": 0.99,
        "high": 1.01,
        "null_ratio": 1.0,
    }
    cells = [{**error, "ratio_2": 1.0, "ratio_2_high": 1.0, "layer": LAYER, "timestep": 250}]
    (judged,) = judgement_rows([error], cells, found["output"])
    assert (judged["verdict"], judged["output_verdict"]) == ("holds", "does not hold")
    assert judged["output_ratio"] == two["ratio"]


def test_ratios_of_sums_are_resampled_as_scipy_does() -> None:
    rng = np.random.default_rng(0)
    numerators = rng.gamma(2, size=(3, 18))
    denominators = rng.gamma(4, size=(3, 18)) + 1
    drawn = cluster_ratios(numerators, denominators, draws=20_000, seed=1)
    assert drawn.shape == (20_001, 3)
    found = interval_of(drawn.mean(1))

    def mean_ratio(*rows: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        sums = [row.sum(axis) for row in rows]
        return np.mean([a / b for a, b in zip(sums[:3], sums[3:], strict=True)], axis=0)

    reference = stats.bootstrap(
        (*numerators, *denominators), mean_ratio, n_resamples=20_000, paired=True,
        method="percentile", rng=np.random.default_rng(2),
    )  # fmt: skip
    assert found.mean == pytest.approx(np.mean(numerators.sum(1) / denominators.sum(1)))
    low, high = reference.confidence_interval
    width = high - low
    assert found.low == pytest.approx(low, abs=0.03 * width)
    assert found.high == pytest.approx(high, abs=0.03 * width)
    with pytest.raises(UsageError, match="15 images are too few"):
        cluster_ratios(numerators[:, :15], denominators[:, :15])


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_the_root_keeps_norms(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    root = norm_root(weight)
    assert root.shape == (12, shape[1])
    e = torch.randn(30, shape[1])
    torch.testing.assert_close((e @ root.T).norm(dim=1), (e @ weight.T).norm(dim=1))
    with pytest.raises(UsageError, match="finite matrix"):
        norm_root(torch.full((2, 2), torch.nan))


def test_normal_errors_approach_those_of_the_normal_distribution() -> None:
    wide = normal_errors(4608, torch.float32, 0)
    exact = [gaussian_error("robust-midrise", bits) for bits in BITS]
    np.testing.assert_allclose(wide[:4], exact[:4], rtol=5e-3)
    tokens = torch.from_numpy(np.random.default_rng(5).standard_normal((40_000, 16)))
    grid = token_grid("robust-midrise")
    for bits, found in zip((1, 2, 3, 4), normal_errors(16, torch.float32, 0), strict=False):
        direct = float((grid.fake_quantize(tokens, bits) - tokens).square().mean())
        assert found == pytest.approx(direct, rel=0.01)


@pytest.mark.parametrize("plan", ["a2", "rtn-w4a4", "bitnetv2-a4"])
def test_a_quantized_layer_has_the_weight_that_it_was_made_of(plan: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))
    before = {
        name: layer.weight.clone()
        for name, layer in model.named_modules()
        if hasattr(layer, "weight")
    }
    chosen = load_plan(plan)
    inputs = [torch.randn(64, 48)]
    quantize_(model, chosen, calibration=inputs if chosen.needs else None)
    layers = quantized_layers(model)
    assert set(layers) == set(before)
    for name, layer in layers.items():
        # Bits and rounding lie in the slots; the master weight and its branch are the function.
        torch.testing.assert_close(input_weight(layer), before[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="GELU has no weight"):
        input_weight(nn.GELU())


def test_tokens_that_are_not_finite_are_in_no_sum() -> None:
    n = 64
    good = tokens_of(0, n, 1.0)
    bad = good.clone()
    bad[::4, 7] = torch.inf
    weight = torch.randn(16, n, generator=torch.Generator().manual_seed(1))
    keep = torch.ones(80, dtype=torch.bool)
    keep[::4] = False
    found = Energy.of(CapturedTokens(bad, IMAGES), OutputSite.of(weight, None))
    wanted = Energy.of(CapturedTokens(good[keep], IMAGES[keep]), OutputSite.of(weight, None))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    rows = tables({100: bad}, weight, "hadamard")["output"]
    assert all(np.isfinite(float(str(row["error"]))) for row in rows)


def test_weights_of_a_shard(tmp_path: Path) -> None:
    part = CapturedTokens(torch.randn(4, 16), torch.arange(4))
    weight = torch.randn(8, 16)
    path = tmp_path / "a.safetensors"
    save_shard(path, {"x": part, "y": part}, {"subject": "s", "timestep": "-1"}, {"x": weight})
    found = load_weights(path)
    assert set(found) == {"x"}
    assert torch.equal(found["x"], weight)
    save_shard(path, {"x": part}, {"subject": "s"}, {"x": weight[:, :8]})
    with pytest.raises(CheckpointError, match=r"weights/x \[8, 8\] needs tokens/x"):
        load_weights(path)
