"""Grids of one scale per token against published errors, plain formulas and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import norm
from torch import Tensor

from robuq_bench.errors import ConfigError, RobuqError
from robuq_bench.methods import method_class, read_method
from robuq_bench.methods.activations._lloyd_max_levels import lloyd_max_codebook
from robuq_bench.methods.activations._robust import ROBUST_STEPS
from robuq_bench.methods.activations._token_grid import GridQuantizer, TokenGrid, token_grid
from robuq_bench.methods.site import Site

ROBUST = ("robust-midtread", "robust-midrise", "lloyd-max")
NAMES = (*ROBUST, "minmax", "bitnet")
INF = math.inf


def quantizer(name: str) -> TokenGrid:
    return token_grid(name)


def widths(name: str) -> range:
    return range(2 if name == "bitnet" else 1, 9)


ALL = [(name, bits) for name in NAMES for bits in widths(name)]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.fixture(scope="module")
def gaussian_token() -> Tensor:
    """The quantiles of N(0, 1) at 2^17 midpoints: one token, integrals without sampling noise."""
    return torch.from_numpy(ndtri((np.arange(2**17) + 0.5) / 2**17))[None]


@pytest.mark.parametrize(
    ("name", "bits", "mse"),
    [
        ("robust-midtread", 1, 0.3634),
        ("robust-midtread", 2, 0.150),
        ("robust-midtread", 3, 0.0408),
        ("robust-midtread", 4, 0.0119),
        ("robust-midrise", 1, 0.3634),
        ("robust-midrise", 2, 0.1188),
        ("robust-midrise", 3, 0.0374),
        ("robust-midrise", 4, 0.0115),
        ("lloyd-max", 1, 0.3634),
        ("lloyd-max", 2, 0.1175),
        ("lloyd-max", 3, 0.0345),
        ("lloyd-max", 4, 0.0095),
        ("bitnet", 4, 0.0131),
    ],
)
def test_gaussian_error(gaussian_token: Tensor, name: str, bits: int, mse: float) -> None:
    """Max (1960) and the published steps; half a unit of the last digit given, plus quadrature."""
    error = (quantizer(name).fake_quantize(gaussian_token, bits) - gaussian_token).square().mean()
    digits = 3 if mse == 0.150 else 4
    assert float(error) == pytest.approx(mse, abs=0.5 * 10**-digits + 1e-5)


@pytest.mark.parametrize(("bits", "mse"), [(2, 0.404), (3, 0.074), (4, 0.016)])
def test_minmax_error_at_the_width_of_dit_xl(bits: int, mse: float) -> None:
    x = randn(2048, 1152, dtype=torch.float32)
    error = (quantizer("minmax").fake_quantize(x, bits) - x).square().mean()
    # Another simulation's figures: at 2 bits the placing of the grid's ends moves the third digit.
    assert float(error) == pytest.approx(mse, abs=0.0005 + 0.02 * mse)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_centroids(bits: int) -> None:
    levels, thresholds = lloyd_max_codebook(bits)
    np.testing.assert_allclose(levels, -levels[::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(thresholds, (levels[1:] + levels[:-1]) / 2, rtol=0, atol=1e-12)
    edges = np.concatenate([[0.0], thresholds[2 ** (bits - 1) :], [INF]])
    mass = norm.sf(edges[:-1]) - norm.sf(edges[1:])
    centroids = -np.diff(norm.pdf(edges)) / mass
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], centroids, rtol=0, atol=1e-9)


def test_lloyd_max_two_bits_is_the_published_table() -> None:
    np.testing.assert_allclose(lloyd_max_codebook(2).levels[2:], [0.4528, 1.5104], atol=5e-5)


def nearest(x: Tensor, name: str, bits: int) -> Tensor:
    """x̂ of tokens x, written from the methods' formulas and a search for the nearest level."""
    half = 2 ** (bits - 1)
    codes = torch.arange(-half, half, dtype=x.dtype)
    if name == "minmax":
        low, high = x.amin(-1, True), x.amax(-1, True)
        step = (high - low) / (2**bits - 1)
        return low + step * torch.round((x - low) / step)
    if name == "bitnet":
        stat = x.abs().amax(-1, True) if bits == 8 else x.abs().mean(-1, True)
        root = 127.0 if bits == 8 else math.sqrt(half - 1)
        return stat / root * torch.clamp(torch.round(x * root / (stat + 1e-5)), -half, half - 1)
    mean = x.mean(-1, True)
    sigma = math.sqrt(math.pi / 2) * (x - mean).abs().mean(-1, True)
    return mean + sigma * robust_level((x - mean) / sigma, name, bits, codes)


def robust_levels(name: str, bits: int, codes: Tensor) -> Tensor:
    """Levels in units of σ̂."""
    if name == "lloyd-max":
        return torch.from_numpy(lloyd_max_codebook(bits).levels).to(codes.dtype)
    if bits == 1:
        return torch.tensor([-1, 1], dtype=codes.dtype) * math.sqrt(2 / math.pi)
    return ROBUST_STEPS[bits - 2] * (codes if name == "robust-midtread" else codes + 0.5)


@pytest.mark.parametrize("name", ["robust-midrise", "robust-midtread"])
def test_one_bit_is_the_mean_plus_or_minus_the_mean_absolute_deviation(name: str) -> None:
    # mean 1, mean |x - 1| = 2: the Gaussian's level times its σ̂ is the deviation itself.
    x = torch.tensor([-3.0, 1.0, 1.5, 4.5], dtype=torch.float64)
    expected = torch.tensor([-1.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(quantizer(name).fake_quantize(x, 1), expected, rtol=1e-15, atol=0)


def robust_level(y: Tensor, name: str, bits: int, codes: Tensor) -> Tensor:
    levels = robust_levels(name, bits, codes)
    return levels[(y[..., None] - levels).abs().argmin(-1)]


@pytest.mark.parametrize(("name", "bits"), ALL)
def test_values_are_the_formulas(name: str, bits: int) -> None:
    x = 3 * randn(4, 96) + 0.7
    torch.testing.assert_close(
        quantizer(name).fake_quantize(x, bits), nearest(x, name, bits), rtol=1e-12, atol=1e-12
    )


@given(
    case=st.sampled_from(ALL),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300)
def test_fake_quantization_is_dequantized_codes(
    case: tuple[str, int], shape: list[int], dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    """Bit for bit, with and without gradient, codes in range and inputs left alone."""
    name, bits = case
    q = quantizer(name)
    x = randn(*shape, 1 + seed % 40, dtype=dtype, seed=seed) * magnitude + seed % 3
    before = x.clone()
    coded = q.quantize(x, bits)
    expected = q.dequantize(coded)
    assert torch.equal(q.fake_quantize(x, bits), expected)
    assert torch.equal(q.fake_quantize(x.requires_grad_(), bits).detach(), expected)
    assert torch.equal(x.detach(), before)
    assert expected.dtype == dtype
    assert bool(expected.isfinite().all())
    assert coded.codes.dtype == torch.int8
    assert coded.codes.shape == x.shape
    assert coded.scale.shape == coded.offset.shape == (*x.shape[:-1], 1)
    assert int(coded.codes.min()) >= -(2 ** (bits - 1))
    assert int(coded.codes.max()) <= 2 ** (bits - 1) - 1
    assert torch.equal(q.dequantize(coded), expected)


def straight_through(x: Tensor, name: str, bits: int, statistics: bool) -> Tensor:
    """Straight-through rounding inside the normalisation, differentiated by autograd alone."""
    mean = x.mean(-1, keepdim=True)
    sigma = math.sqrt(math.pi / 2) * (x - mean).abs().mean(-1, keepdim=True)
    if not statistics:
        mean, sigma = mean.detach(), sigma.detach()
    y = (x - mean) / sigma
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=x.dtype)
    levels = robust_levels(name, bits, codes)
    # The half cell beyond the outermost levels still passes gradient.
    reach = (levels[1] - levels[0]) / 2
    inside = (y > levels[0] - reach) & (y < levels[-1] + reach)
    q = robust_level(y.detach(), name, bits, codes)
    return mean + sigma * torch.where(inside, y + (q - y).detach(), q)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", ROBUST)
def test_gradient_is_autograds(name: str, bits: int) -> None:
    x = 2 * randn(6, 64, seed=bits) + 0.3
    upstream = randn(6, 64, seed=99)
    grads = []
    for function in (
        lambda x: quantizer(name).fake_quantize(x, bits),
        lambda x: straight_through(x, name, bits, statistics=True),
    ):
        leaf = x.clone().requires_grad_()
        function(leaf).backward(upstream)
        assert leaf.grad is not None
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ROBUST)
def test_direct_gradient_is_zero_outside_the_clip(name: str, bits: int) -> None:
    """With the statistics held fixed the gradient is the mask of the clip, nothing else.

    An upstream gradient orthogonal to the terms that reach the mean and σ̂ leaves only the mask.
    """
    x = randn(1, 512, seed=bits)
    x[0, :2] = torch.tensor([9.0, -9.0])  # outside the clip of every width
    leaf = x.clone().requires_grad_()
    straight_through(leaf, name, bits, statistics=False).sum().backward()
    assert leaf.grad is not None
    mask = leaf.grad
    assert sorted(mask.unique().tolist()) == [0.0, 1.0]
    mean = x.mean()
    sigma = math.sqrt(math.pi / 2) * (x - mean).abs().mean()
    y = (x - mean) / sigma
    values = (quantizer(name).fake_quantize(x, bits) - mean) / sigma
    basis = torch.linalg.qr(torch.cat([1 - mask, values - mask * y]).T).Q
    upstream = randn(1, 512, seed=7)
    upstream = upstream - (upstream @ basis) @ basis.T
    leaf = x.clone().requires_grad_()
    quantizer(name).fake_quantize(leaf, bits).backward(upstream)
    torch.testing.assert_close(leaf.grad, mask * upstream, rtol=0, atol=1e-9)
    assert float(leaf.grad[mask == 0].abs().max()) < 1e-9


@pytest.mark.parametrize(("name", "bits"), [("minmax", 2), ("bitnet", 4), ("bitnet", 8)])
def test_identity_gradient(name: str, bits: int) -> None:
    leaf = randn(3, 32).requires_grad_()
    upstream = randn(3, 32, seed=1)
    quantizer(name).fake_quantize(leaf, bits).backward(upstream)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, upstream)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("value", [0.0, 3.7, -5.0, 1e-20, 1e30])
@pytest.mark.parametrize(("name", "bits"), [case for case in ALL if case[0] != "bitnet"])
def test_constant_tokens(name: str, bits: int, value: float, length: int) -> None:
    """Constant, all-zero and one-element tokens come back; their gradient is finite."""
    x = torch.full((2, length), value, requires_grad=True)
    y = quantizer(name).fake_quantize(x, bits)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=0)
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("bits", range(2, 9))
def test_bitnet_constant_tokens(bits: int) -> None:
    """All-zero tokens are exact; other constants are off by at most half a step."""
    q = quantizer("bitnet")
    assert not q.fake_quantize(torch.zeros(2, 5), bits).any()
    y = q.fake_quantize(torch.full((2, 5), 3.7), bits)
    step = 3.7 / (127 if bits == 8 else math.sqrt(2 ** (bits - 1) - 1))
    assert float((y - 3.7).abs().max()) <= step / 2 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "bits"), ALL)
def test_infinite_entries_saturate(name: str, bits: int, dtype: torch.dtype) -> None:
    """Such a token has mean 0 and unit scale; overflowing statistics count as infinite."""
    q = quantizer(name)
    # Half the largest float: BitNet's outermost level, 128 of 127 steps, must not overflow itself.
    largest = torch.finfo(dtype).max / 2
    x = torch.tensor([[1, INF, -2, 0.3], [-INF, INF, 0, 1], [largest, -largest, 1, 2]], dtype=dtype)
    leaf = x.clone().requires_grad_()
    y = q.fake_quantize(leaf, bits)
    assert bool(y.isfinite().all())
    assert torch.equal(y.detach(), q.dequantize(q.quantize(x, bits)))
    codes = q.quantize(x, bits).codes
    assert codes[0, 1] == codes[1, 1] == 2 ** (bits - 1) - 1
    assert codes[1, 0] == -(2 ** (bits - 1))
    y.sum().backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize(("name", "bits"), ALL)
def test_a_token_of_one_infinity_saturates(name: str, bits: int, value: float) -> None:
    q = quantizer(name)
    leaf = torch.full((2, 6), value, requires_grad=True)
    y = q.fake_quantize(leaf, bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert set(q.quantize(leaf, bits).codes.flatten().tolist()) == {high if value > 0 else low}
    assert bool(y.isfinite().all())
    y.sum().backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize(("name", "bits"), ALL)
def test_nan_stays_nan(name: str, bits: int) -> None:
    x = torch.tensor([[1.0, math.nan, -2.0], [1.0, 2.0, 4.0]])
    y = quantizer(name).fake_quantize(x, bits)
    assert bool(y[0, 1].isnan())
    assert bool(y[1].isfinite().all())
    with pytest.raises(RobuqError, match="NaN"):
        quantizer(name).quantize(x, bits)


@pytest.mark.parametrize("bits", [-1, 0, 9, True])
@pytest.mark.parametrize("name", NAMES)
def test_bad_bits(name: str, bits: int) -> None:
    calls: list[Callable[[Tensor, int], object]] = [
        quantizer(name).quantize,
        quantizer(name).fake_quantize,
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=f"{name}.*bits, got {bits}"):
            call(torch.ones(1, 4), bits)


def test_bitnet_has_no_one_bit_form() -> None:
    with pytest.raises(ConfigError, match="2 to 8 bits, got 1"):
        quantizer("bitnet").quantize(torch.ones(1, 4), 1)


def test_unknown_quantizer() -> None:
    assert read_method("activation", "none") is None
    with pytest.raises(ConfigError, match="did you mean 'lloyd-max'"):
        token_grid("lloydmax")


@pytest.mark.parametrize(("name", "bits"), ALL)
def test_a_method_fits_the_module_of_its_grid(name: str, bits: int) -> None:
    """What fills the slot computes the grid, for training and for packing, and no parameter."""
    method = method_class("activation", name).model_validate({"method": name, "bits": bits})
    module = method.fit(torch.zeros(3, 96), Site("a"))
    assert isinstance(module, GridQuantizer)
    assert module.grid is quantizer(name)
    assert not module.state_dict()
    x = randn(4, 96)
    assert torch.equal(module(x, bits), quantizer(name).fake_quantize(x, bits))
    assert torch.equal(module.codes(x, bits).codes, quantizer(name).quantize(x, bits).codes)
    assert method.scales_per_token(96) == (1 if name == "bitnet" else 2)


def test_bits_that_a_grid_does_not_have_are_refused_when_a_plan_is_read() -> None:
    with pytest.raises(ValueError, match="'bitnet' takes 2 to 8 bits, got 1"):
        read_method("activation", {"method": "bitnet", "bits": 1})
    module = read_method("activation", "bitnet").fit(torch.zeros(3, 4), Site("a"))
    with pytest.raises(ConfigError, match="'bitnet' takes 2 to 8 bits, got 1"):
        module.check_bits(1)


@given(case=st.sampled_from(ALL), seed=st.integers(0, 999), power=st.integers(-8, 8))
@settings(max_examples=100)
def test_equivariance(case: tuple[str, int], seed: int, power: int) -> None:
    """Permutations commute; so do powers of two, exactly, but for BitNet's absolute ε."""
    name, bits = case
    q = quantizer(name)
    x = randn(2, 33, seed=seed)
    y = q.fake_quantize(x, bits)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(q.fake_quantize(x[:, order], bits), y[:, order])
    assert torch.equal(q.fake_quantize(x.flip(0), bits), y.flip(0))
    if name != "bitnet":
        assert torch.equal(q.fake_quantize(x * 2.0**power, bits), y * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "bits"), [(name, 4) for name in NAMES])
def test_half_precision_is_computed_in_float32(name: str, bits: int, dtype: torch.dtype) -> None:
    x = randn(3, 64).to(dtype)
    q = quantizer(name)
    y = q.fake_quantize(x, bits)
    assert y.dtype == dtype
    assert torch.equal(y, q.fake_quantize(x.float(), bits).to(dtype))
